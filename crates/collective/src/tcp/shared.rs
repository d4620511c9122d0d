//! Frames between two ranks of one machine: their payloads by memory that both map, their headers by the connection.
//!
//! Stage: below `duplex`. The sender owns anonymous memory with room for a few frames and offers it over the connection; the
//! receiver maps it, if it can open it, to read only. Then a frame goes like this: the sender waits for room, copies the payload,
//! sends the header; the receiver reads the header, takes the payload, and sends one byte back, which is room for another.
//! Invariants:
//! - both sides know from a frame's length alone which way it goes, and the order of frames is that of the connection;
//! - memory is never named in a file system: it is gone with the last process that maps it, however that ends; nobody but its
//!   sender writes to it;
//! - whoever cannot share (another machine, another user, a container with its own processes) says so, and the connection
//!   carries all.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;

use memmap2::{MmapOptions, MmapRaw};

use super::frame::FRAME_BYTES;
use super::sum;
use crate::DType;

/// Frames that are on their way at once. All of them lie in a core's cache.
const SLOTS: usize = 4;
/// Smaller payloads go with their header.
const LEAST: usize = 16 << 10;
/// A page before the frames; it begins with the token.
const HEAD: usize = 4096;
const BYTES: usize = HEAD + SLOTS * FRAME_BYTES;
const TOKEN: usize = 32;
/// Process, descriptor, token; no process is no offer.
pub(super) const OFFER_BYTES: usize = 16 + TOKEN;
/// What a receiver says about an offer, and of a payload that it has taken.
pub(super) const YES: u8 = 1;
pub(super) const NO: u8 = 0;

/// Whether a payload of this length goes by memory, where there is one.
pub(super) fn goes_by_memory(length: usize) -> bool {
    length >= LEAST
}

/// The slot of the frame with this number among those that go by memory.
fn slot(number: u64) -> usize {
    HEAD + (number % SLOTS as u64) as usize * FRAME_BYTES
}

/// The sender's side.
pub(super) struct Outbox {
    memory: MmapRaw,
    /// Kept for the receiver, who opens it through this process.
    file: File,
    token: [u8; TOKEN],
    put: u64,
    taken: u64,
}

impl Outbox {
    /// # Errors
    /// If the system has no such memory.
    pub(super) fn new() -> io::Result<Self> {
        let (file, memory) = sealed()?;
        let mut token = [0; TOKEN];
        getrandom::fill(&mut token).map_err(io::Error::other)?;
        let outbox = Self { memory, file, token, put: 0, taken: 0 };
        outbox.write(0, &outbox.token);
        Ok(outbox)
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= BYTES, "{} bytes at {at} do not fit", bytes.len());
        // SAFETY: the mapping has BYTES bytes, which the assertion keeps to, and they stay, because the file is sealed
        // against shrinking; `bytes` is memory of this process alone. The receiver may only read, and reads a slot between
        // the header that follows this and its answer, as Outbox::has_room and Inbox::take keep to.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.memory.as_mut_ptr().add(at), bytes.len()) };
    }

    pub(super) fn offer(&self) -> [u8; OFFER_BYTES] {
        let mut offer = [0; OFFER_BYTES];
        offer[..8].copy_from_slice(&u64::from(std::process::id()).to_le_bytes());
        offer[8..16].copy_from_slice(&(self.file.as_raw_fd() as u64).to_le_bytes());
        offer[16..].copy_from_slice(&self.token);
        offer
    }

    /// Hears what the receiver has taken, until no more than `most` payloads lie here; whether that is so.
    fn hear(&mut self, most: usize, mut connection: &TcpStream) -> io::Result<bool> {
        let mut said = [0; SLOTS];
        while self.put - self.taken > most as u64 {
            match connection.read(&mut said) {
                Ok(0) => return Err(io::Error::other("it closed the connection")),
                Ok(count) if self.taken + count as u64 <= self.put => self.taken += count as u64,
                Ok(_) => return Err(io::Error::other("it says that it took what it was not sent")),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Whether a slot is free.
    ///
    /// # Errors
    /// If the connection is closed or broken.
    pub(super) fn has_room(&mut self, connection: &TcpStream) -> io::Result<bool> {
        self.hear(SLOTS - 1, connection)
    }

    /// Whether every payload was taken.
    ///
    /// # Errors
    /// If the connection is closed or broken.
    pub(super) fn is_empty(&mut self, connection: &TcpStream) -> io::Result<bool> {
        self.hear(0, connection)
    }

    /// Lays a payload into the next slot, which [`Outbox::has_room`] has found free. Its header goes afterwards.
    pub(super) fn put(&mut self, payload: &[u8]) {
        assert!(payload.len() <= FRAME_BYTES && self.put - self.taken < SLOTS as u64, "no room for a payload");
        self.write(slot(self.put), payload);
        self.put += 1;
    }
}

/// The receiver's side.
pub(super) struct Inbox {
    memory: MmapRaw,
    taken: u64,
}

impl Inbox {
    /// Maps what the previous rank offers.
    ///
    /// # Errors
    /// If nothing is offered, or it is not to be had from here.
    pub(super) fn open(offer: &[u8; OFFER_BYTES]) -> io::Result<Self> {
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| offer[at + byte]));
        let (process, descriptor) = (word(0), word(8));
        if process == 0 {
            return Err(io::Error::other("the rank before shares no memory"));
        }
        let file = open_sealed(process, descriptor)?;
        let memory = MmapOptions::new().len(BYTES).map_raw_read_only(&file)?;
        let inbox = Self { memory, taken: 0 };
        let mut token = [0; TOKEN];
        inbox.read(0, &mut token);
        // the same numbers may name something else on another machine
        if token == offer[16..] {
            Ok(inbox)
        } else {
            Err(io::Error::other("the memory is not that of the rank before"))
        }
    }

    fn read(&self, at: usize, into: &mut [u8]) {
        assert!(at + into.len() <= BYTES, "{} bytes at {at} are not there", into.len());
        // SAFETY: the mapping has BYTES bytes, which the assertion keeps to, and they stay, because `open_sealed` has seen the seal
        // against shrinking; `into` is memory of this process alone. Bytes that the sender changes meanwhile, against its promise,
        // would be wrong numbers: they are copied, and nothing else is read from here.
        unsafe { std::ptr::copy_nonoverlapping(self.memory.as_ptr().add(at), into.as_mut_ptr(), into.len()) };
    }

    /// Takes the next payload, whose header has come, and tells the sender that its slot is free.
    ///
    /// # Errors
    /// If the connection is broken.
    pub(super) fn take(&mut self, into: &mut [u8], sum: Option<DType>, mut connection: &TcpStream) -> io::Result<()> {
        let from = slot(self.taken);
        match sum {
            None => self.read(from, into),
            Some(dtype) => {
                assert!(into.len() <= FRAME_BYTES, "{} bytes are not in a slot", into.len());
                // SAFETY: as in `read`; a slot has FRAME_BYTES bytes
                unsafe { sum::add_from(dtype, into, self.memory.as_ptr().add(from)) };
            }
        }
        self.taken += 1;
        // never more than SLOTS bytes are on their way, which every connection has room for
        connection.write_all(&[YES])
    }
}

/// Its name, as the system shows it.
#[cfg(target_os = "linux")]
const NAME: &std::ffi::CStr = c"learn-collective";

/// Anonymous memory that cannot be made shorter or longer, and its mapping, which is the only one that can be written to.
#[cfg(target_os = "linux")]
fn sealed() -> io::Result<(File, MmapRaw)> {
    use std::os::fd::FromRawFd;

    // SAFETY: the name is a string that ends with 0, which the call reads; what it returns is a descriptor or -1.
    let descriptor = unsafe { libc::memfd_create(NAME.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was made just now, and nobody else has it.
    let file = unsafe { File::from_raw_fd(descriptor) };
    file.set_len(BYTES as u64)?;
    let memory = MmapOptions::new().len(BYTES).map_raw(&file)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_FUTURE_WRITE | libc::F_SEAL_SEAL;
    // SAFETY: the call takes a descriptor that lives and a number.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((file, memory))
}

/// Such memory of another process of this machine and this user.
#[cfg(target_os = "linux")]
fn open_sealed(process: u64, descriptor: u64) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;

    let path = format!("/proc/{process}/fd/{descriptor}");
    let refused = || io::Error::other("it is not sealed memory of the right size");
    // on another machine the numbers may name anything, which is not to be touched
    let named = std::fs::read_link(&path)?;
    if !named.to_string_lossy().starts_with(&format!("/memfd:{}", NAME.to_string_lossy())) {
        return Err(refused());
    }
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    // SAFETY: the call takes a descriptor that lives, and no further argument.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    if seals < 0 || seals & libc::F_SEAL_SHRINK == 0 || file.metadata()?.len() != BYTES as u64 {
        return Err(refused());
    }
    Ok(file)
}

#[cfg(not(target_os = "linux"))]
fn sealed() -> io::Result<(File, MmapRaw)> {
    Err(io::Error::from(io::ErrorKind::Unsupported))
}

#[cfg(not(target_os = "linux"))]
fn open_sealed(_process: u64, _descriptor: u64) -> io::Result<File> {
    Err(io::Error::from(io::ErrorKind::Unsupported))
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn connection() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (receiver, _) = listener.accept().unwrap();
        sender.set_nonblocking(true).unwrap();
        (sender, receiver)
    }

    #[test]
    fn payloads_come_in_their_order_and_room_is_what_was_taken() {
        let (sender, receiver) = connection();
        let mut outbox = Outbox::new().unwrap();
        let mut inbox = Inbox::open(&outbox.offer()).unwrap();
        let payload = |number: usize| vec![number as f32; FRAME_BYTES / 4 - number];
        let mut taken = 0;
        let mut take = |taken: &mut usize| {
            let expected = payload(*taken);
            let mut got = vec![1_f32; expected.len()];
            let sum = taken.is_multiple_of(2).then_some(DType::F32);
            inbox.take(bytemuck::cast_slice_mut(&mut got), sum, &receiver).unwrap();
            let held = if sum.is_some() { 1.0 } else { 0.0 };
            assert!(got.iter().zip(&expected).all(|(got, expected)| *got == expected + held));
            *taken += 1;
        };
        for number in 0..3 * SLOTS {
            if !outbox.has_room(&sender).unwrap() {
                assert_eq!(number - taken, SLOTS);
                take(&mut taken);
                take(&mut taken);
                while !outbox.has_room(&sender).unwrap() {}
            }
            outbox.put(bytemuck::cast_slice(&payload(number)));
        }
        assert_eq!(taken, 2 * SLOTS);
        drop(receiver);
        let closed = loop {
            match outbox.has_room(&sender) {
                Ok(room) if room => outbox.put(&[]),
                Ok(_) => {}
                Err(error) => break error.to_string(),
            }
        };
        assert!(closed.contains("closed"), "{closed}");
    }

    #[test]
    fn what_is_not_the_offered_memory_is_refused() {
        let outbox = Outbox::new().unwrap();
        let offer = outbox.offer();
        let refused = |change: &dyn Fn(&mut [u8; OFFER_BYTES])| {
            let mut offer = offer;
            change(&mut offer);
            Inbox::open(&offer).err().unwrap().to_string()
        };
        assert!(Inbox::open(&offer).is_ok());
        assert!(refused(&|offer| *offer = [0; OFFER_BYTES]).contains("shares no memory"));
        assert!(refused(&|offer| offer[40] ^= 1).contains("not that of the rank before"));
        // this process's standard input, whatever it is, and a descriptor that does not exist
        assert!(!refused(&|offer| offer[8..16].fill(0)).is_empty());
        assert!(!refused(&|offer| offer[8..16].fill(0xff)).is_empty());
    }
}
