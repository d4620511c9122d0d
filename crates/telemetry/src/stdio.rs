//! What a process says to whoever has started it: messages on stderr, results on stdout.
//!
//! Input: lines and texts. Output: the same, and whether anybody still reads results. Invariant: a reader that has gone
//! (`| head`, a `tee` that Ctrl-C has ended, a terminal that was closed) ends no work: a message that cannot be written is
//! dropped, and who prints results is told that nobody wants more.

use std::fmt::Display;
use std::io::{self, ErrorKind, Write};

/// Writes a line to stderr, or drops it if that is not possible.
pub fn say(line: impl Display) {
    say_to(&mut io::stderr().lock(), line);
}

/// Writes a text to stdout as it is; `false` if nobody reads any more.
///
/// # Errors
/// Stdout cannot be written for another reason, a full disk for example.
pub fn print(text: &str) -> io::Result<bool> {
    print_to(&mut io::stdout().lock(), text)
}

fn say_to(out: &mut impl Write, line: impl Display) {
    let _dropped = writeln!(out, "{line}");
}

fn print_to(out: &mut impl Write, text: &str) -> io::Result<bool> {
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        written => written.map(|()| true),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn a_reader_that_has_gone_is_no_error_and_a_full_disk_is_one() {
        let mut read = Vec::new();
        say_to(&mut read, "one");
        assert!(print_to(&mut read, "two\n").unwrap());
        assert_eq!(read, b"one\ntwo\n");

        let (reader, mut writer) = io::pipe().unwrap();
        drop(reader);
        assert!(!print_to(&mut writer, "three\n").unwrap());
        say_to(&mut writer, "nobody hears it");

        let mut full = File::options().write(true).open("/dev/full").unwrap();
        assert_eq!(print_to(&mut full, "four\n").unwrap_err().kind(), ErrorKind::StorageFull);
        say_to(&mut full, "nor is there room for it");
    }
}
