//! A command on a real terminal of its own: util-linux' `script` makes it, and what is written to it is read as a terminal would.

use std::fs;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// A terminal and what runs on it.
pub struct Terminal {
    script: Child,
    keys: ChildStdin,
    output: Receiver<Vec<u8>>,
    folder: PathBuf,
    pub screen: Screen,
    /// Everything that was written to it.
    pub written: Vec<u8>,
}

impl Terminal {
    /// Starts a command, whose standard streams are the terminal, in a folder that is its own.
    ///
    /// # Panics
    /// If `script` is not there.
    #[must_use]
    pub fn start(folder: &Path, command: &Command, (columns, rows): (u16, u16)) -> Self {
        fs::create_dir_all(folder).expect("the folder can be made");
        let quoted = |text: &std::ffi::OsStr| format!("'{}'", text.to_str().expect("UTF-8").replace('\'', r"'\''"));
        let words = std::iter::once(command.get_program()).chain(command.get_args()).map(quoted);
        let words = words.collect::<Vec<_>>().join(" ");
        let at = |name: &str| quoted(folder.join(name).as_os_str());
        let (before, after, tty, pid, exit) = (at("before"), at("after"), at("tty"), at("pid"), at("exit"));
        // the settings of the terminal before and after, and the command between under the pid that is written down
        let session = format!(
            "stty rows {rows} cols {columns}; tty > {tty}; stty -g > {before}; \
             sh -c 'echo $$ > \"$0\"; exec \"$@\"' {pid} {words}; echo $? > {exit}; stty -g > {after}"
        );
        let mut script = Command::new("script");
        script.args(["--quiet", "--flush", "--command", &session, "/dev/null"]).env("TERM", "xterm-256color");
        script.env("SHELL", "/bin/sh").env_remove("NO_COLOR");
        for (key, value) in command.get_envs() {
            match value {
                Some(value) => script.env(key, value),
                None => script.env_remove(key),
            };
        }
        script.current_dir(command.get_current_dir().unwrap_or(folder));
        let mut script = script.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("util-linux has `script`");
        let keys = script.stdin.take().expect("it is piped");
        let mut from = script.stdout.take().expect("it is piped");
        let (say, output) = mpsc::channel();
        thread::spawn(move || {
            let mut bytes = vec![0; 1 << 16];
            while let Ok(count @ 1..) = from.read(&mut bytes) {
                if say.send(bytes[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        let screen = Screen::new(columns, rows);
        Self { script, keys, output, folder: folder.to_owned(), screen, written: Vec::new() }
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.folder.join(name)).unwrap_or_default().trim().to_owned()
    }

    /// Waits until the screen is as wanted.
    ///
    /// # Panics
    /// If it is not in time.
    pub fn until(&mut self, what: &str, patience: Duration, wanted: impl Fn(&Screen) -> bool) {
        let end = Instant::now() + patience;
        while !wanted(&self.screen) {
            let left = end.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(bytes) => self.take(&bytes),
                Err(error) => panic!("{what}: {error}; the screen is\n{}", self.screen.text()),
            }
        }
    }

    fn take(&mut self, bytes: &[u8]) {
        self.screen.feed(bytes);
        self.written.extend_from_slice(bytes);
    }

    /// Presses keys.
    ///
    /// # Panics
    /// If the terminal is gone.
    pub fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).and_then(|()| self.keys.flush()).expect("somebody reads");
    }

    /// Gives the terminal another size, as a window that is dragged.
    ///
    /// # Panics
    /// If it cannot.
    pub fn resize(&mut self, columns: u16, rows: u16) {
        let tty = fs::File::open(self.read("tty")).expect("the terminal is there");
        let (columns_text, rows_text) = (columns.to_string(), rows.to_string());
        let mut stty = Command::new("stty");
        stty.args(["rows", &rows_text, "cols", &columns_text]).stdin(tty);
        self.screen = Screen::new(columns, rows).on_alternate(self.screen.alternate, self.screen.cursor);
        assert!(stty.status().expect("stty starts").success());
    }

    /// The process of the command.
    ///
    /// # Panics
    /// If it has not begun.
    #[must_use]
    pub fn pid(&self) -> u64 {
        self.read("pid").parse().expect("the command runs")
    }

    /// Takes the terminal away from the command, without a word.
    ///
    /// # Panics
    /// If it cannot be killed.
    pub fn vanish(mut self) {
        self.script.kill().and_then(|()| self.script.wait()).expect("it is a child");
    }

    /// Waits until all is over; the exit code of the command, and whether the terminal's settings are those of before.
    ///
    /// # Panics
    /// If it is not over in time.
    pub fn end(mut self, patience: Duration) -> Ended {
        let end = Instant::now() + patience;
        loop {
            match self.output.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(bytes) => self.take(&bytes),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => panic!("the command goes on; the screen is\n{}", self.screen.text()),
            }
        }
        let status = self.script.wait().expect("script ends");
        let (before, after) = (self.read("before"), self.read("after"));
        assert!(!before.is_empty(), "stty has said nothing");
        let code = self.read("exit").parse().expect("the command has ended");
        Ended { status, code, restored: before == after, screen: self.screen, written: self.written }
    }
}

/// What a command has left behind.
pub struct Ended {
    pub status: ExitStatus,
    pub code: i32,
    /// The settings of the terminal are those of before.
    pub restored: bool,
    pub screen: Screen,
    pub written: Vec<u8>,
}

/// What a terminal shows: as much of its language as full-screen programs speak.
#[derive(Clone, Debug)]
pub struct Screen {
    columns: usize,
    rows: usize,
    cells: Vec<Vec<char>>,
    at: (usize, usize),
    /// What was there before the alternate screen.
    main: Vec<Vec<char>>,
    pub alternate: bool,
    /// The cursor is seen.
    pub cursor: bool,
    /// Bytes of something that is not complete.
    rest: Vec<u8>,
}

impl Screen {
    #[must_use]
    pub fn new(columns: u16, rows: u16) -> Self {
        let (columns, rows) = (usize::from(columns), usize::from(rows));
        let cells = vec![vec![' '; columns]; rows];
        Self { columns, rows, main: cells.clone(), cells, at: (0, 0), alternate: false, cursor: true, rest: Vec::new() }
    }

    fn on_alternate(mut self, alternate: bool, cursor: bool) -> Self {
        (self.alternate, self.cursor) = (alternate, cursor);
        self
    }

    /// Its rows, without the spaces at their ends.
    #[must_use]
    pub fn text(&self) -> String {
        self.cells.iter().map(|row| row.iter().collect::<String>().trim_end().to_owned() + "\n").collect()
    }

    /// One row, from 0.
    #[must_use]
    pub fn row(&self, row: usize) -> String {
        self.cells.get(row).map(|row| row.iter().collect()).unwrap_or_default()
    }

    #[must_use]
    pub fn contains(&self, part: &str) -> bool {
        self.cells.iter().any(|row| row.iter().collect::<String>().contains(part))
    }

    /// Takes what is written to it.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.rest.extend_from_slice(bytes);
        let bytes = std::mem::take(&mut self.rest);
        let mut at = 0;
        while at < bytes.len() {
            let used = match bytes[at] {
                0x1b => self.escape(&bytes[at..]),
                b'\r' => {
                    self.at.1 = 0;
                    1
                }
                b'\n' => {
                    self.line_feed();
                    1
                }
                control @ (0..0x20 | 0x7f) => {
                    self.at.1 = if control == 8 { self.at.1.saturating_sub(1) } else { self.at.1 };
                    1
                }
                first => self.letter(first, &bytes[at..]),
            };
            if used == 0 {
                break;
            }
            at += used;
        }
        self.rest = bytes[at..].to_vec();
    }

    fn line_feed(&mut self) {
        if self.at.0 + 1 < self.rows {
            self.at.0 += 1;
        } else {
            self.cells.remove(0);
            self.cells.push(vec![' '; self.columns]);
        }
    }

    fn letter(&mut self, first: u8, bytes: &[u8]) -> usize {
        let length = match first {
            0..0xc0 => 1,
            0xc0..0xe0 => 2,
            0xe0..0xf0 => 3,
            _ => 4,
        };
        if bytes.len() < length {
            return 0;
        }
        let letter =
            std::str::from_utf8(&bytes[..length]).ok().and_then(|text| text.chars().next()).unwrap_or('\u{fffd}');
        if self.at.1 >= self.columns {
            self.at.1 = 0;
            self.line_feed();
        }
        if let Some(cell) = self.cells.get_mut(self.at.0).and_then(|row| row.get_mut(self.at.1)) {
            *cell = letter;
        }
        self.at.1 += 1;
        length
    }

    /// The bytes of a sequence that starts here; 0 if its end is still to come.
    fn escape(&mut self, bytes: &[u8]) -> usize {
        if bytes.get(1) != Some(&b'[') {
            return if bytes.len() < 2 { 0 } else { 2 };
        }
        let Some(end) = bytes[2..].iter().position(|byte| (0x40..0x7f).contains(byte)) else { return 0 };
        let words = String::from_utf8_lossy(&bytes[2..2 + end]).into_owned();
        let number = |place: usize| words.split(';').nth(place).and_then(|word| word.parse::<usize>().ok());
        match (bytes[2 + end], words.as_str()) {
            (b'H', _) => self.at = (number(0).unwrap_or(1).max(1) - 1, number(1).unwrap_or(1).max(1) - 1),
            (b'J', _) => self.cells = vec![vec![' '; self.columns]; self.rows],
            (b'K', _) => {
                let row = self.cells.get_mut(self.at.0).map(|row| row.iter_mut().skip(self.at.1));
                row.into_iter().flatten().for_each(|cell| *cell = ' ');
            }
            (b'A', _) => self.at.0 = self.at.0.saturating_sub(number(0).unwrap_or(1)),
            (b'B', _) => self.at.0 = (self.at.0 + number(0).unwrap_or(1)).min(self.rows - 1),
            (b'C', _) => self.at.1 += number(0).unwrap_or(1),
            (b'D', _) => self.at.1 = self.at.1.saturating_sub(number(0).unwrap_or(1)),
            (b'h', "?1049") if !self.alternate => {
                self.alternate = true;
                self.main = std::mem::replace(&mut self.cells, vec![vec![' '; self.columns]; self.rows]);
            }
            (b'l', "?1049") if self.alternate => {
                self.alternate = false;
                self.cells = std::mem::take(&mut self.main);
                self.cells.resize(self.rows, vec![' '; self.columns]);
                self.at = (0, 0);
            }
            (b'h', "?25") => self.cursor = true,
            (b'l', "?25") => self.cursor = false,
            _ => {}
        }
        3 + end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_screen_is_what_was_written_to_it() {
        let mut screen = Screen::new(6, 2);
        screen.feed(b"one\r\ntwo\r\nthree");
        assert_eq!(screen.text(), "two\nthree\n", "it scrolls");
        let drawn = "\x1b[?1049h\x1b[?25l\x1b[2J\x1b[1;3H\x1b[31m●x\x1b[0m\x1b[2;6Hend";
        for byte in drawn.bytes() {
            screen.feed(&[byte]);
        }
        assert_eq!(
            (screen.text().as_str(), screen.alternate, screen.cursor),
            ("     e\nnd\n", true, false),
            "a row is full"
        );
        screen.feed(b"\x1b[?1049l\x1b[?25h");
        assert_eq!((screen.text().as_str(), screen.alternate, screen.cursor), ("two\nthree\n", false, true));
    }
}
