//! `crowd listen PORT COUNT` and `crowd connect ADDRESS FIRST_PORT PORTS COUNT NAME`: one end of more connections than a test may have
//! descriptors for.
//!
//! Each says `ready` when its connections are there (the listener, when it listens), does its next step when it is sent a line, and ends with its
//! standard input. The listener tells from where its connections are, and echoes a word on each; the other end sends a word that
//! names the connection, and says `right` if each hears its own again.

use std::io::{self, BufRead, Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::process::ExitCode;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(30);
/// Nobody waits for longer than this.
const LIFE: Duration = Duration::from_secs(150);

fn main() -> ExitCode {
    std::thread::spawn(|| {
        std::thread::sleep(LIFE);
        println!("not done after {LIFE:?}");
        std::process::exit(1);
    });
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = match &words[..] {
        ["listen", port, count] => port.parse().ok().zip(count.parse().ok()).map(|(port, count)| listen(port, count)),
        ["connect", address, rest @ ..] => {
            let numbers: Option<Vec<u32>> = rest.iter().map(|word| word.parse().ok()).collect();
            match (address.parse().ok(), numbers.as_deref()) {
                (Some(address), Some([first, ports, count, name])) => {
                    Some(connect(address, *first as u16, *ports as u16, *count, *name))
                }
                _ => None,
            }
        }
        _ => None,
    };
    match done {
        Some(Ok(())) => ExitCode::SUCCESS,
        Some(Err(error)) => {
            println!("{error}");
            ExitCode::FAILURE
        }
        None => {
            eprintln!("usage: crowd listen PORT COUNT | crowd connect ADDRESS FIRST_PORT PORTS COUNT NAME");
            ExitCode::from(2)
        }
    }
}

fn say(what: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{what}")?;
    out.flush()
}

/// Waits for a line; for the end of the input if there is none.
fn told() -> io::Result<()> {
    io::stdin().lock().read_line(&mut String::new()).map(drop)
}

fn listen(port: u16, count: usize) -> io::Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", port))?;
    say("ready")?;
    let mut streams = Vec::with_capacity(count);
    for _ in 0..count {
        let (stream, from) = listener.accept()?;
        stream.set_read_timeout(Some(PATIENCE))?;
        say(&from.to_string())?;
        streams.push(stream);
    }
    let mut word = [0; 4];
    for stream in &mut streams {
        stream.read_exact(&mut word)?;
        stream.write_all(&word)?;
    }
    told()
}

fn connect(address: IpAddr, first: u16, ports: u16, count: u32, name: u32) -> io::Result<()> {
    let open = |number: u32| {
        let port = first + (number % u32::from(ports)) as u16;
        let stream = TcpStream::connect_timeout(&(address, port).into(), PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    };
    let mut streams = (0..count).map(open).collect::<io::Result<Vec<TcpStream>>>()?;
    say("ready")?;
    told()?;
    for (number, stream) in (0_u32..).zip(&mut streams) {
        stream.write_all(&(name * count + number).to_be_bytes())?;
        // All at once they overflow the kernel's queues between namespaces, and so do all of them when they are sent again.
        if number % 2 == 1 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    let mut word = [0; 4];
    for (number, stream) in (0_u32..).zip(&mut streams) {
        stream.read_exact(&mut word)?;
        if u32::from_be_bytes(word) != name * count + number {
            return say("another one's answer");
        }
    }
    say("right")?;
    told()
}
