//! What a program needs of the machine that it runs on, as `readelf` tells it.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};

use crate::process;

/// Libraries of every Linux that the binaries run on, and of the C++ compiler's runtime.
const OF_THE_SYSTEM: [&str; 8] = [
    "ld-linux-x86-64.so.2",
    "libc.so.6",
    "libdl.so.2",
    "libgcc_s.so.1",
    "libm.so.6",
    "libpthread.so.0",
    "librt.so.1",
    "libstdc++.so.6",
];
/// Libraries that `install` brings.
const OF_LIBTORCH: [&str; 2] = ["libc10.so", "libtorch_cpu.so"];

/// The dynamic section of a program, and its C library.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Needs {
    pub libraries: Vec<String>,
    /// Where they are looked for.
    pub paths: Vec<String>,
    /// The oldest glibc that has all that it calls, like (2, 34).
    pub glibc: (u32, u32),
}

impl Needs {
    /// # Errors
    /// If `readelf` is missing or the file is no program.
    pub fn of(program: &Path) -> Result<Self> {
        let read = |flag: &str| process::output("readelf", Command::new("readelf").args([flag, "-W"]).arg(program));
        Ok(Self::parse(&read("-d")?, &read("-V")?))
    }

    /// From what `readelf -d` and `readelf -V` print.
    fn parse(dynamic: &str, versions: &str) -> Self {
        let mut needs = Self::default();
        for line in dynamic.lines() {
            let Some(value) = line.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map(|(value, _)| value)
            else {
                continue;
            };
            if line.contains("(NEEDED)") {
                needs.libraries.push(value.to_owned());
            } else if line.contains("(RUNPATH)") || line.contains("(RPATH)") {
                needs.paths.extend(value.split(':').map(str::to_owned));
            }
        }
        let glibc = versions.split("Name: GLIBC_").skip(1).filter_map(|rest| {
            let (major, rest) = rest.split_once('.')?;
            let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
            Some((major.parse().ok()?, rest[..digits].parse().ok()?))
        });
        needs.glibc = glibc.max().unwrap_or_default();
        needs
    }

    /// Whether the program runs wherever it is put, with `install`'s libraries beside it.
    ///
    /// # Errors
    /// What it needs of the machine that it was built on.
    pub fn is_relocatable(&self, libtorch: bool) -> Result<()> {
        let absolute: Vec<_> = self.paths.iter().filter(|path| !path.starts_with("$ORIGIN/")).collect();
        ensure!(absolute.is_empty(), "it looks for libraries in {absolute:?}, which only this machine may have");
        let known = |library: &&String| {
            OF_THE_SYSTEM.contains(&library.as_str()) || (libtorch && OF_LIBTORCH.contains(&library.as_str()))
        };
        let unknown: Vec<_> = self.libraries.iter().filter(|library| !known(library)).collect();
        ensure!(unknown.is_empty(), "it needs {unknown:?}, which nobody brings");
        ensure!(!libtorch || !self.paths.is_empty(), "it does not say where libtorch is");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DYNAMIC: &str = "
Dynamic section at offset 0x1 contains 3 entries:
  Tag                Type                         Name/Value
 0x0000000000000001 (NEEDED)                     Shared library: [libtorch_cpu.so]
 0x0000000000000001 (NEEDED)                     Shared library: [libc.so.6]
 0x000000000000001d (RUNPATH)                    Library runpath: [$ORIGIN/../libtorch/torch/lib:/home/me/lib]
 0x000000000000000c (INIT)                       0x1000
";
    const VERSIONS: &str = "  0x0010:   Name: GLIBC_2.9  Flags: none  Version: 7\n  0x0020:   Name: GLIBC_2.34  Flags: none\n\
                              0x0030:   Name: GLIBC_2.2.5  Flags: none\n  Name: CXXABI_1.3  Flags: none";

    #[test]
    fn libraries_paths_and_the_c_library_are_read() {
        let needs = Needs::parse(DYNAMIC, VERSIONS);
        assert_eq!(needs.libraries, ["libtorch_cpu.so", "libc.so.6"]);
        assert_eq!(needs.paths, ["$ORIGIN/../libtorch/torch/lib", "/home/me/lib"]);
        assert_eq!(needs.glibc, (2, 34));
    }

    #[test]
    fn paths_and_libraries_of_one_machine_are_refused() {
        let mut needs = Needs::parse(DYNAMIC, VERSIONS);
        assert!(needs.is_relocatable(true).unwrap_err().to_string().contains("/home/me/lib"));
        needs.paths.pop();
        needs.is_relocatable(true).unwrap();
        assert!(needs.is_relocatable(false).unwrap_err().to_string().contains("libtorch_cpu.so"));
        needs.libraries.push("libssl.so.3".into());
        assert!(needs.is_relocatable(true).unwrap_err().to_string().contains("libssl.so.3"));
        let nowhere = Needs { libraries: vec!["libc10.so".into()], ..Needs::default() };
        assert!(nowhere.is_relocatable(true).unwrap_err().to_string().contains("where libtorch is"));
    }
}
