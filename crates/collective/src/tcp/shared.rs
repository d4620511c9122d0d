//! Frames between two ranks of one machine: their payloads by memory that both map, their headers by the connection.
//!
//! Stage: below `duplex`. The sender owns anonymous memory with room for a few frames and offers it over the
//! connection; the receiver maps it, if it can open it, to read only. Then a frame goes like this: the sender waits for
//! room, copies the payload, sends the header; the receiver reads the header, takes the payload, and sends one byte
//! back, which is room for another. Invariants:
//! - both sides know from a frame's length alone which way it goes, and the order of frames is that of the connection;
//! - whoever cannot share (another machine, another user, a container with its own processes) says so, and the connection
//!   carries all.

use std::io::{self, Read, Write};
use std::net::TcpStream;

use super::frame::FRAME_BYTES;
use crate::sealed::{Offer, Own, Theirs};
use crate::{DType, sum};

/// Frames that are on their way at once. All of them lie in a core's cache.
const SLOTS: usize = 4;
/// Smaller payloads go with their header.
const LEAST: usize = 16 << 10;
const BYTES: usize = SLOTS * FRAME_BYTES;
/// What a receiver says about an offer, and of a payload that it has taken.
pub(super) const YES: u8 = 1;
pub(super) const NO: u8 = 0;

/// Whether a payload of this length goes by memory, where there is one.
pub(super) fn goes_by_memory(length: usize) -> bool {
    length >= LEAST
}

/// The slot of the frame with this number among those that go by memory.
fn slot(number: u64) -> usize {
    (number % SLOTS as u64) as usize * FRAME_BYTES
}

/// The sender's side.
pub(super) struct Outbox {
    memory: Own,
    put: u64,
    taken: u64,
}

impl Outbox {
    /// # Errors
    /// If the system has no such memory.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { memory: Own::new(BYTES)?, put: 0, taken: 0 })
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.memory.bytes(), "{} bytes at {at} do not fit", bytes.len());
        // SAFETY: the assertion keeps to the memory; `bytes` is memory of this process alone. The receiver may only
        // read, and reads a slot between the header that follows this and its answer, as Outbox::has_room and
        // Inbox::take keep to.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.memory.start().add(at), bytes.len()) };
    }

    pub(super) fn offer(&self) -> Offer {
        self.memory.offer()
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
    memory: Theirs,
    taken: u64,
}

impl Inbox {
    /// Maps what the previous rank offers.
    ///
    /// # Errors
    /// If nothing is offered, or it is not to be had from here.
    pub(super) fn open(offer: &Offer) -> io::Result<Self> {
        Ok(Self { memory: Theirs::open(offer, BYTES)?, taken: 0 })
    }

    fn read(&self, at: usize, into: &mut [u8]) {
        assert!(at + into.len() <= self.memory.bytes(), "{} bytes at {at} are not there", into.len());
        // SAFETY: the assertion keeps to the memory; `into` is memory of this process alone. Bytes that the sender
        // changes meanwhile, against its promise, would be wrong numbers: they are copied, and nothing else is read
        // from here.
        unsafe { std::ptr::copy_nonoverlapping(self.memory.start().add(at), into.as_mut_ptr(), into.len()) };
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
                unsafe { sum::add_from(dtype, into, self.memory.start().add(from)) };
            }
        }
        self.taken += 1;
        // never more than SLOTS bytes are on their way, which every connection has room for
        connection.write_all(&[YES])
    }
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
}
