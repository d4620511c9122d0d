//! Which tensors do not fit a layout.

use std::collections::BTreeMap;
use std::fmt;

use tch::Tensor;

use super::ParameterSpec;

/// Names that do not fit; at least one list is not empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mismatch {
    pub missing: Vec<String>,
    pub unexpected: Vec<String>,
    /// Sentences such as `a.bias is [8] instead of [7]`.
    pub misshaped: Vec<String>,
}

impl Mismatch {
    pub(super) fn is_empty(&self) -> bool {
        self.missing.is_empty() && self.unexpected.is_empty() && self.misshaped.is_empty()
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut before = " ";
        let lists =
            [("missing: ", &self.missing), ("unexpected: ", &self.unexpected), ("misshaped: ", &self.misshaped)];
        for (title, names) in lists.into_iter().filter(|(_, names)| !names.is_empty()) {
            write!(f, "{before}{title}{}", names.join(", "))?;
            before = "; ";
        }
        Ok(())
    }
}

/// The tensors in the order of `specs`, if they are exactly those.
pub fn compare(specs: &[ParameterSpec], tensors: &[(String, Tensor)]) -> Result<Vec<Tensor>, Mismatch> {
    let (found, mismatch) = sift(specs, tensors);
    if mismatch.is_empty() { Ok(found.into_iter().flatten().collect()) } else { Err(mismatch) }
}

/// The tensors that fit, in the order of `specs`, and what does not.
pub fn sift(specs: &[ParameterSpec], tensors: &[(String, Tensor)]) -> (Vec<Option<Tensor>>, Mismatch) {
    let mut mismatch = Mismatch::default();
    let mut given = BTreeMap::new();
    for (name, tensor) in tensors {
        if let Some(_twice) = given.insert(name.as_str(), tensor) {
            mismatch.unexpected.push(format!("{name} (again)"));
        }
    }
    let mut found = Vec::with_capacity(specs.len());
    for spec in specs {
        found.push(match given.remove(spec.name.as_str()) {
            None => {
                mismatch.missing.push(spec.name.clone());
                None
            }
            Some(tensor) if tensor.size() != spec.shape => {
                mismatch.misshaped.push(format!("{} is {:?} instead of {:?}", spec.name, tensor.size(), spec.shape));
                None
            }
            Some(tensor) if !tensor.is_floating_point() => {
                mismatch.misshaped.push(format!("{} is {:?} instead of floating-point", spec.name, tensor.kind()));
                None
            }
            Some(tensor) => Some(tensor.shallow_clone()),
        });
    }
    mismatch.unexpected.extend(given.into_keys().map(ToOwned::to_owned));
    (found, mismatch)
}
