//! One ring step: sending to the next rank while receiving from the previous one, on one thread.
//!
//! Non-blocking sockets and `poll`: a rank never waits to send without also being ready to receive, so buffers of any
//! size pass around the ring without deadlock. Each direction is at least one frame, even for no bytes, so ranks that
//! disagree about an operation notice it at once. Sums are added frame by frame while the kernel keeps both directions
//! moving. Large frames to a rank of the same machine go by shared memory ([`super::shared`]).

use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::Arc;

use super::frame::{FRAME_BYTES, HEADER_BYTES, Header};
use super::poll;
use super::shared::{Inbox, NO, Outbox, YES, goes_by_memory};
use crate::abort::Aborter;
use crate::buffer::DType;
use crate::call::{Call, Op};
use crate::sealed::NO_OFFER;
use crate::secret::Key;
use crate::{CollectiveError, sum};

/// One direction of one connection after its handshake. The socket is non-blocking.
pub(super) struct Link {
    pub(super) peer: usize,
    pub(super) stream: Arc<TcpStream>,
    pub(super) key: Key,
    pub(super) generation: u64,
    /// Frames that went over it.
    pub(super) frames: u64,
}

impl Link {
    fn header(&mut self, op: Op, length: usize) -> Header {
        let sequence = self.frames;
        self.frames += 1;
        // `length` is at most FRAME_BYTES.
        Header { generation: self.generation, sequence, op, length: length as u32 }
    }

    fn lost(&self, call: &Call, reason: impl ToString) -> CollectiveError {
        CollectiveError::PeerLost { op: call.name, peer: Some(self.peer), reason: reason.to_string() }
    }
}

/// What to do with received bytes.
pub(super) struct Receive<'a> {
    pub(super) into: &'a mut [u8],
    /// Add to `into` as elements of this type instead of replacing it.
    pub(super) sum: Option<DType>,
}

/// What one step moves; `None` is a direction that is not used.
pub(super) struct Transfer<'a> {
    pub(super) op: Op,
    pub(super) send: Option<&'a [u8]>,
    pub(super) receive: Option<Receive<'a>>,
}

/// Both connections of a rank.
pub(super) struct Duplex {
    pub(super) next: Link,
    pub(super) previous: Link,
    pub(super) sent: u64,
    /// Room for one frame of terms, as u64 so that it is aligned for every type.
    scratch: Vec<u64>,
    /// If the next rank reads this one's memory.
    outbox: Option<Outbox>,
    /// If the memory of the previous rank is mapped here.
    inbox: Option<Inbox>,
}

impl Duplex {
    pub(super) fn new(next: Link, previous: Link) -> Self {
        Self { next, previous, sent: 0, scratch: vec![0; FRAME_BYTES / 8], outbox: None, inbox: None }
    }

    /// Offers the next rank memory of this one, if it `may`, and maps what the previous rank offers. What cannot be shared goes
    /// by the connection.
    pub(super) fn share(&mut self, may: bool, call: &Call, aborter: &Aborter) -> Result<(), CollectiveError> {
        let outbox = match may {
            true => Outbox::new().inspect_err(|error| tracing::debug!(%error, "no memory to share")).ok(),
            false => None,
        };
        let offer = outbox.as_ref().map_or(NO_OFFER, Outbox::offer);
        let mut theirs = NO_OFFER;
        let receive = Some(Receive { into: &mut theirs, sum: None });
        self.exchange(Transfer { op: Op::Connect, send: Some(&offer), receive }, call, aborter)?;
        let why_not = |error: &io::Error| tracing::debug!(rank = self.previous.peer, %error, "memory is not shared");
        self.inbox = if may { Inbox::open(&theirs).inspect_err(why_not).ok() } else { None };
        // an abort closes the connections, and is not to be told as a loss
        let honest = |error| aborter.check().err().unwrap_or(error);
        let answer = if self.inbox.is_some() { YES } else { NO };
        let answered = (&*self.previous.stream).write_all(&[answer]);
        answered.map_err(|error| honest(self.previous.lost(call, error)))?;
        self.outbox = if self.answer(call).map_err(honest)? == YES { outbox } else { None };
        Ok(())
    }

    /// Waits for what the next rank says about the offer.
    fn answer(&self, call: &Call) -> Result<u8, CollectiveError> {
        let mut answer = [NO];
        loop {
            match (&*self.next.stream).read(&mut answer) {
                Ok(0) => return Err(self.next.lost(call, "it closed the connection")),
                Ok(_) => return Ok(answer[0]),
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(error) => return Err(self.next.lost(call, error)),
            }
            call.check(Some(self.next.peer))?;
            poll::wait(&mut [poll::readable(self.next.stream.as_fd())], call.until())
                .map_err(|error| self.next.lost(call, error))?;
        }
    }

    pub(super) fn exchange(
        &mut self,
        transfer: Transfer<'_>,
        call: &Call,
        aborter: &Aborter,
    ) -> Result<(), CollectiveError> {
        let Transfer { op, send, receive } = transfer;
        let mut sending = send.map(|bytes| Sending::new(bytes, op, &mut self.next));
        let mut receiving = receive.map(|receive| Receiving::new(receive, op, &mut self.previous));
        let scratch: &mut [u8] = bytemuck::cast_slice_mut(&mut self.scratch);
        loop {
            aborter.check()?;
            // Received first: when both neighbours are gone, the one that data was awaited from is named.
            let mut moved = false;
            let mut full = false;
            if let Some(state) = &mut receiving {
                let progress = state
                    .advance(&mut self.previous, self.inbox.as_mut(), scratch, call)
                    .or_else(|e| aborter.check().and(Err(e)))?;
                moved |= progress != Progress::Blocked;
                if progress == Progress::Done {
                    receiving = None;
                }
            }
            if let Some(state) = &mut sending {
                let progress = state
                    .advance(&mut self.next, self.outbox.as_mut(), &mut self.sent, call)
                    .or_else(|e| aborter.check().and(Err(e)))?;
                full = progress == Progress::Full;
                moved |= !full && progress != Progress::Blocked;
                if progress == Progress::Done {
                    sending = None;
                }
            }
            if receiving.is_none() && sending.is_none() {
                return Ok(());
            }
            let waiting_for = if receiving.is_some() { self.previous.peer } else { self.next.peer };
            call.check(Some(waiting_for))?;
            if !moved {
                let mut entries = [poll::nothing(), poll::nothing()];
                if receiving.is_some() {
                    entries[0] = poll::readable(self.previous.stream.as_fd());
                }
                if sending.is_some() {
                    let stream = self.next.stream.as_fd();
                    entries[1] = if full { poll::readable(stream) } else { poll::writable(stream) };
                }
                poll::wait(&mut entries, call.until()).map_err(|error| self.previous.lost(call, error))?;
            }
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Progress {
    Done,
    Moved,
    Blocked,
    /// The next rank has to take what lies in the shared memory first.
    Full,
}

struct Sending<'a> {
    op: Op,
    header: [u8; HEADER_BYTES],
    payload: &'a [u8],
    rest: &'a [u8],
    /// Bytes of the current frame that are out, header included.
    out: usize,
}

impl<'a> Sending<'a> {
    fn new(bytes: &'a [u8], op: Op, link: &mut Link) -> Self {
        let (payload, rest) = bytes.split_at(bytes.len().min(FRAME_BYTES));
        Self { op, header: link.header(op, payload.len()).encode(&link.key), payload, rest, out: 0 }
    }

    fn advance(
        &mut self,
        link: &mut Link,
        mut outbox: Option<&mut Outbox>,
        sent: &mut u64,
        call: &Call,
    ) -> Result<Progress, CollectiveError> {
        if self.is_out() {
            return self.wait_until_taken(link, outbox, call);
        }
        if let Some(outbox) = outbox.as_deref_mut().filter(|_| self.out == 0 && goes_by_memory(self.payload.len())) {
            if !outbox.has_room(&link.stream).map_err(|error| link.lost(call, error))? {
                return Ok(Progress::Full);
            }
            outbox.put(self.payload);
            *sent += self.payload.len() as u64;
            // the connection has the header to carry
            self.payload = &[];
        }
        let header = &self.header[self.out.min(HEADER_BYTES)..];
        let payload = &self.payload[self.out.saturating_sub(HEADER_BYTES)..];
        match (&*link.stream).write_vectored(&[IoSlice::new(header), IoSlice::new(payload)]) {
            Ok(0) => return Err(link.lost(call, "the connection takes no more data")),
            Ok(count) => {
                self.out += count;
                *sent += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Progress::Blocked),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(link.lost(call, error)),
        }
        if !self.is_out() {
            return Ok(Progress::Moved);
        }
        if self.rest.is_empty() {
            return self.wait_until_taken(link, outbox, call);
        }
        *self = Self::new(self.rest, self.op, link);
        Ok(Progress::Moved)
    }

    /// Whether the connection has the frame.
    fn is_out(&self) -> bool {
        self.out == HEADER_BYTES + self.payload.len()
    }

    /// A rank that is done may leave at once, and its memory is to be read before that.
    fn wait_until_taken(
        &self,
        link: &Link,
        outbox: Option<&mut Outbox>,
        call: &Call,
    ) -> Result<Progress, CollectiveError> {
        let taken = outbox.map_or(Ok(true), |outbox| outbox.is_empty(&link.stream));
        Ok(if taken.map_err(|error| link.lost(call, error))? { Progress::Done } else { Progress::Full })
    }
}

struct Receiving<'a> {
    op: Op,
    expected: Header,
    header: [u8; HEADER_BYTES],
    payload: &'a mut [u8],
    rest: &'a mut [u8],
    sum: Option<DType>,
    /// Bytes of the current frame that are in, header included.
    got: usize,
}

impl<'a> Receiving<'a> {
    fn new(receive: Receive<'a>, op: Op, link: &mut Link) -> Self {
        let length = receive.into.len().min(FRAME_BYTES);
        let (payload, rest) = receive.into.split_at_mut(length);
        let expected = link.header(op, length);
        Self { op, expected, header: [0; HEADER_BYTES], payload, rest, sum: receive.sum, got: 0 }
    }

    fn advance(
        &mut self,
        link: &mut Link,
        inbox: Option<&mut Inbox>,
        scratch: &mut [u8],
        call: &Call,
    ) -> Result<Progress, CollectiveError> {
        let room = if self.got < HEADER_BYTES {
            &mut self.header[self.got..]
        } else if self.sum.is_some() {
            &mut scratch[self.got - HEADER_BYTES..self.payload.len()]
        } else {
            &mut self.payload[self.got - HEADER_BYTES..]
        };
        match (&*link.stream).read(room) {
            Ok(0) => return Err(link.lost(call, "it closed the connection")),
            Ok(count) => self.got += count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Progress::Blocked),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(Progress::Moved),
            Err(error) => return Err(link.lost(call, error)),
        }
        if self.got == HEADER_BYTES {
            self.expected.check(&self.header, &link.key).map_err(|reason| CollectiveError::Protocol {
                op: call.name,
                peer: link.peer,
                reason,
            })?;
        }
        if let Some(inbox) = inbox.filter(|_| goes_by_memory(self.payload.len())) {
            if self.got < HEADER_BYTES {
                return Ok(Progress::Moved);
            }
            inbox.take(self.payload, self.sum, &link.stream).map_err(|error| link.lost(call, error))?;
        } else {
            if self.got < HEADER_BYTES + self.payload.len() {
                return Ok(Progress::Moved);
            }
            if let Some(dtype) = self.sum {
                sum::add(dtype, self.payload, &scratch[..self.payload.len()]);
            }
        }
        if self.rest.is_empty() {
            return Ok(Progress::Done);
        }
        let into = std::mem::take(&mut self.rest);
        *self = Self::new(Receive { into, sum: self.sum }, self.op, link);
        Ok(Progress::Moved)
    }
}
