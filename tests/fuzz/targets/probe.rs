//! See `weft_tests::fuzz_entries::probe`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| weft_tests::fuzz_entries::probe(bytes));
