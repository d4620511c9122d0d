//! Anonymous memory of one rank that others of its machine map to read.
//!
//! Input: how many bytes. Output: the owner's mapping, and an offer by which another process finds the memory.
//! Invariants: memory is never named in a file system: it is gone with the last process that maps it, however that
//! ends; its length is sealed, and nobody but its owner writes to it; an offer of another machine is not mistaken for
//! one of this one.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use memmap2::{MmapOptions, MmapRaw};

use crate::{Buffer, Collective, CollectiveError};

/// A page before the content; it begins with the token.
const HEAD: usize = 4096;
const TOKEN: usize = 32;
/// Process, descriptor, token; no process is no offer.
const OFFER_BYTES: usize = 16 + TOKEN;
pub(crate) type Offer = [u8; OFFER_BYTES];
pub(crate) const NO_OFFER: Offer = [0; OFFER_BYTES];
/// Numbers of 64 bits in which an offer travels.
const WORDS: usize = OFFER_BYTES / 8;

/// What every rank offers, in rank order. Every rank calls it, or none.
///
/// # Errors
/// If the collective fails.
pub(crate) fn gather_offers(collective: &mut dyn Collective, own: &Offer) -> Result<Vec<Offer>, CollectiveError> {
    let counts = vec![WORDS; collective.world_size()];
    let mut send: [i64; WORDS] = bytemuck::pod_read_unaligned(own);
    let mut offers = vec![0_i64; WORDS * counts.len()];
    collective.all_gather(&counts, &mut Buffer::i64(&mut send), &mut Buffer::i64(&mut offers))?;
    let offer = |words: &[i64]| bytemuck::pod_read_unaligned(bytemuck::cast_slice(words));
    Ok(offers.chunks_exact(WORDS).map(offer).collect())
}

/// The owner's side.
pub(crate) struct Own {
    memory: MmapRaw,
    bytes: usize,
    /// Kept for the others, who open it through this process.
    file: File,
    token: [u8; TOKEN],
}

/// What a rank maps of another one.
pub(crate) struct Theirs {
    memory: MmapRaw,
    bytes: usize,
}

impl Own {
    /// Memory of so many bytes, all 0, that is taken now: there is an error and no signal later where there is not enough.
    ///
    /// # Errors
    /// If the system has no such memory.
    pub(crate) fn new(bytes: usize) -> io::Result<Self> {
        Self::make(bytes, true)
    }

    /// Memory of so many bytes, all 0, that is taken as it fills. The system counts no page of it before one of those who
    /// map it touches that page, whether to write or to read, and counts it once, with who was first. If it has none left
    /// then, that process ends, as with ordinary memory (by SIGBUS where `vm.overcommit_memory` is 2).
    ///
    /// # Errors
    /// If the system has no such memory.
    pub(crate) fn sparse(bytes: usize) -> io::Result<Self> {
        Self::make(bytes, false)
    }

    fn make(bytes: usize, now: bool) -> io::Result<Self> {
        let (file, memory) = sealed(HEAD + bytes, now)?;
        let mut token = [0; TOKEN];
        getrandom::fill(&mut token).map_err(io::Error::other)?;
        // SAFETY: the mapping is longer than the token, and nobody else knows of it yet
        unsafe { std::ptr::copy_nonoverlapping(token.as_ptr(), memory.as_mut_ptr(), TOKEN) };
        Ok(Self { memory, bytes, file, token })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The first of the bytes, which are there as long as this is.
    pub(crate) fn start(&self) -> *mut u8 {
        self.memory.as_mut_ptr().wrapping_add(HEAD)
    }

    pub(crate) fn offer(&self) -> Offer {
        let mut offer = NO_OFFER;
        offer[..8].copy_from_slice(&u64::from(std::process::id()).to_le_bytes());
        offer[8..16].copy_from_slice(&(self.file.as_raw_fd() as u64).to_le_bytes());
        offer[16..].copy_from_slice(&self.token);
        offer
    }
}

impl Theirs {
    /// Maps so many bytes that are offered.
    ///
    /// # Errors
    /// If nothing is offered, or it is not to be had from here.
    pub(crate) fn open(offer: &Offer, bytes: usize) -> io::Result<Self> {
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| offer[at + byte]));
        let (process, descriptor) = (word(0), word(8));
        if process == 0 {
            return Err(io::Error::other("the rank shares no memory"));
        }
        let file = open_sealed(process, descriptor, HEAD + bytes)?;
        let memory = MmapOptions::new().len(HEAD + bytes).map_raw_read_only(&file)?;
        let mut token = [0; TOKEN];
        // SAFETY: the mapping is longer than the token, and is not made shorter, because `open_sealed` has seen the seal
        unsafe { std::ptr::copy_nonoverlapping(memory.as_ptr(), token.as_mut_ptr(), TOKEN) };
        // the same numbers may name something else on another machine
        if token == offer[16..] {
            Ok(Self { memory, bytes })
        } else {
            Err(io::Error::other("the memory is not that of the rank"))
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The first of the bytes, which are there as long as this is, because their number is sealed. Their owner may
    /// write to them.
    pub(crate) fn start(&self) -> *const u8 {
        self.memory.as_ptr().wrapping_add(HEAD)
    }
}

/// Its name, as the system shows it.
#[cfg(target_os = "linux")]
const NAME: &std::ffi::CStr = c"learn-collective";

/// Anonymous memory that cannot be made shorter or longer, and its mapping, which is the only one that can be written to;
/// taken `now`, or as it fills.
#[cfg(target_os = "linux")]
fn sealed(bytes: usize, now: bool) -> io::Result<(File, MmapRaw)> {
    use std::os::fd::FromRawFd;

    // SAFETY: the name is a string that ends with 0, which the call reads; what it returns is a descriptor or -1.
    let descriptor = unsafe { libc::memfd_create(NAME.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was made just now, and nobody else has it.
    let file = unsafe { File::from_raw_fd(descriptor) };
    file.set_len(bytes as u64)?;
    // SAFETY: the call takes a descriptor that lives and numbers.
    if now && unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, bytes as libc::off_t) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let memory = MmapOptions::new().len(bytes).map_raw(&file)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_FUTURE_WRITE | libc::F_SEAL_SEAL;
    // SAFETY: the call takes a descriptor that lives and a number.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((file, memory))
}

/// Such memory of another process of this machine and this user.
#[cfg(target_os = "linux")]
fn open_sealed(process: u64, descriptor: u64, bytes: usize) -> io::Result<File> {
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
    if seals < 0 || seals & libc::F_SEAL_SHRINK == 0 || file.metadata()?.len() != bytes as u64 {
        return Err(refused());
    }
    Ok(file)
}

#[cfg(not(target_os = "linux"))]
fn sealed(_bytes: usize, _now: bool) -> io::Result<(File, MmapRaw)> {
    Err(io::Error::from(io::ErrorKind::Unsupported))
}

#[cfg(not(target_os = "linux"))]
fn open_sealed(_process: u64, _descriptor: u64, _bytes: usize) -> io::Result<File> {
    Err(io::Error::from(io::ErrorKind::Unsupported))
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_the_offered_memory_is_refused() {
        for own in [Own::new(64), Own::sparse(64)] {
            refuses(&own.unwrap());
        }
    }

    fn refuses(own: &Own) {
        let offer = own.offer();
        let refused = |change: &dyn Fn(&mut Offer)| {
            let mut offer = offer;
            change(&mut offer);
            Theirs::open(&offer, 64).err().unwrap().to_string()
        };
        assert_eq!(Theirs::open(&offer, 64).unwrap().bytes(), own.bytes());
        assert!(Theirs::open(&offer, 65).err().unwrap().to_string().contains("right size"));
        assert!(refused(&|offer| *offer = NO_OFFER).contains("shares no memory"));
        assert!(refused(&|offer| offer[40] ^= 1).contains("not that of the rank"));
        // this process's standard input, whatever it is, and a descriptor that does not exist
        assert!(!refused(&|offer| offer[8..16].fill(0)).is_empty());
        assert!(!refused(&|offer| offer[8..16].fill(0xff)).is_empty());
    }
}
