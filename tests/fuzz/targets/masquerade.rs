//! See `weft_tests::fuzz_entries::masquerade`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| weft_tests::fuzz_entries::masquerade(bytes));
