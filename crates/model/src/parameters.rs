//! Named parameters as views into one flat buffer.
//!
//! Input: specifications, and a seed or tensors. Output: leaf tensors for the towers, and flat buffers `[P]` of values
//! and gradients for the collective and the optimizer. Invariants: names are sorted, so every rank has the same layout;
//! the initial values are a pure function of (seed, name, shape), whatever the device and the other parameters.

mod buckets;
mod mismatch;
mod rows;
mod slots;

use std::cell::RefCell;
use std::f64::consts::TAU;
use std::ops::Range;
use std::sync::Arc;

pub use buckets::{Bucket, Milestone};
use learn_domain::random::{self, Draws};
use learn_torch::OwnVector;
pub use mismatch::Mismatch;
use rows::ItemVectors;
pub use rows::RowGradient;
pub(crate) use slots::Slot;
use slots::Slots;
use tch::{Device, Kind, Tensor};

use crate::by_hand::Working;
use crate::{ModelError, PchShape};

/// What a parameter is; decides its initial value and whether weight decay applies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Role {
    /// Normal with this standard deviation; the only role that decays.
    Weight { std: f64 },
    /// A vector per position or time gap: normal with this standard deviation.
    Position { std: f64 },
    /// Starts at 0.
    Bias,
    /// The scale of a layer norm: starts at 1.
    NormScale,
    /// The logarithm of the logit scale: starts at this value.
    LogitScale { start: f64 },
    /// A vector per item: normal with this standard deviation. Lies outside the flat buffers, because a step touches a
    /// few of its rows only; a model has one such table at most.
    ItemVector { std: f64 },
    /// The projection of a residual path: 0 until it is measured. Decay would pull it away from where it starts.
    Residual,
    /// Measured once and never trained: 0 until then. Its gradient is 0, so the optimizer leaves it as it is.
    Measured,
}

/// Name, shape and role of a parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct ParameterSpec {
    pub name: String,
    pub shape: Vec<i64>,
    pub role: Role,
}

/// The parameters of a model.
#[derive(Debug)]
pub struct Parameters {
    /// Sorted by name.
    specs: Vec<ParameterSpec>,
    /// `[P]`, the values.
    flat: Tensor,
    /// `[P]`, the latest gradient.
    gradient: Tensor,
    /// The memory that it lies in, if that is not libtorch's own.
    gradient_memory: Option<Arc<OwnVector>>,
    /// Views into `flat`, by the order of `specs`; they collect gradients.
    leaves: Vec<Tensor>,
    /// Views into `gradient`.
    slots: Slots,
    /// Parts of `gradient`.
    buckets: Vec<Bucket>,
    /// The towers' weights in the kind of their products.
    working: RefCell<Option<Working>>,
    /// The table of item vectors, if the model has one.
    items: Option<ItemVectors>,
}

impl Role {
    /// Whether weight decay applies.
    #[must_use]
    pub fn decays(self) -> bool {
        matches!(self, Self::Weight { .. } | Self::ItemVector { .. })
    }

    fn trains(self) -> bool {
        self != Self::Measured
    }

    fn values(self, draws: Draws, count: usize) -> Vec<f32> {
        match self {
            Self::Weight { std } | Self::Position { std } | Self::ItemVector { std } => normals(draws, count, std),
            Self::Bias | Self::Residual | Self::Measured => vec![0.0; count],
            Self::NormScale => vec![1.0; count],
            Self::LogitScale { start } => vec![start as f32; count],
        }
    }
}

impl ParameterSpec {
    #[must_use]
    pub fn new(name: impl Into<String>, shape: &[i64], role: Role) -> Self {
        Self { name: name.into(), shape: shape.to_vec(), role }
    }

    pub(crate) fn count(&self) -> i64 {
        self.shape.iter().product()
    }
}

impl Parameters {
    /// New parameters of a PCH in f32.
    #[must_use]
    pub fn init(shape: &PchShape, seed: u64, device: Device) -> Self {
        Self::init_specs(shape.specs(), seed, device)
    }

    /// New parameters in f32.
    #[must_use]
    pub fn init_specs(specs: Vec<ParameterSpec>, seed: u64, device: Device) -> Self {
        let (specs, table) = parted(specs);
        let values = |spec: &ParameterSpec| {
            let draws = Draws::new(&[seed, random::text_key(&spec.name)]);
            spec.role.values(draws, usize::try_from(spec.count()).unwrap_or_default())
        };
        let flat: Vec<f32> = specs.iter().flat_map(values).collect();
        let items = table.map(|spec| {
            let vectors = Tensor::from_slice(&values(&spec)).view(spec.shape.as_slice()).to_device(device);
            ItemVectors::new(spec, vectors)
        });
        Self::over(specs, Tensor::from_slice(&flat).to_device(device), items)
    }

    /// Parameters of a PCH from tensors of any floating kind.
    ///
    /// # Errors
    /// Names are missing or unexpected, or shapes differ; all of them are listed.
    pub fn load(
        shape: &PchShape,
        tensors: Vec<(String, Tensor)>,
        kind: Kind,
        device: Device,
    ) -> Result<Self, ModelError> {
        Self::load_specs(shape.specs(), tensors, kind, device)
    }

    /// As [`Parameters::load`], of any model.
    ///
    /// # Errors
    /// As [`Parameters::load`].
    pub fn load_specs(
        specs: Vec<ParameterSpec>,
        tensors: Vec<(String, Tensor)>,
        kind: Kind,
        device: Device,
    ) -> Result<Self, ModelError> {
        let (specs, table) = parted(specs);
        let count = specs.iter().map(ParameterSpec::count).sum::<i64>();
        let items = table.map(|spec| {
            let vectors = Tensor::zeros(spec.shape.as_slice(), (kind, device));
            ItemVectors::new(spec, vectors)
        });
        let mut parameters = Self::over(specs, Tensor::zeros([count], (kind, device)), items);
        parameters.assign(tensors)?;
        Ok(parameters)
    }

    /// Replaces every value in place; on an error nothing is changed.
    ///
    /// # Errors
    /// As [`Parameters::load`].
    pub fn assign(&mut self, tensors: Vec<(String, Tensor)>) -> Result<(), ModelError> {
        let targets = views(&self.specs, &self.flat).chain(self.item_vectors().map(Tensor::shallow_clone));
        copy_by_name(&self.all_specs(), targets, tensors)
    }

    /// Replaces the values of which there is a tensor of that name and shape, in place.
    pub fn assign_fitting(&mut self, tensors: &[(String, Tensor)]) {
        let (found, _) = mismatch::sift(&self.all_specs(), tensors);
        let targets = views(&self.specs, &self.flat).chain(self.item_vectors().map(Tensor::shallow_clone));
        tch::no_grad(|| {
            for (mut target, tensor) in targets.zip(found) {
                if let Some(tensor) = tensor {
                    target.copy_(&tensor.detach());
                }
            }
        });
    }

    fn over(specs: Vec<ParameterSpec>, flat: Tensor, items: Option<ItemVectors>) -> Self {
        let flat = learn_torch::in_large_pages(flat);
        let gradient = zeros_like(&flat);
        let leaf = |(view, spec): (Tensor, &ParameterSpec)| view.detach().set_requires_grad(spec.role.trains());
        let leaves = views(&specs, &flat).zip(&specs).map(leaf).collect();
        let slots = Slots::new(views(&specs, &gradient).collect());
        let buckets = buckets::buckets(&specs, buckets::SMALL);
        Self {
            specs,
            flat,
            gradient,
            gradient_memory: None,
            leaves,
            slots,
            buckets,
            working: RefCell::default(),
            items,
        }
    }

    /// Of the flat buffers, sorted by name.
    pub fn specs(&self) -> &[ParameterSpec] {
        &self.specs
    }

    /// Of the flat buffers, then of the table of item vectors.
    #[must_use]
    pub fn all_specs(&self) -> Vec<ParameterSpec> {
        self.specs.iter().chain(self.items.as_ref().map(|items| &items.spec)).cloned().collect()
    }

    /// Of the flat buffers, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.specs.iter().map(|spec| spec.name.as_str())
    }

    /// The leaf of this name.
    ///
    /// # Panics
    /// There is none: the parameters belong to a model of another shape.
    pub fn get(&self, name: &str) -> &Tensor {
        self.find(name).unwrap_or_else(|| panic!("the model has no parameter {name}"))
    }

    /// The leaf of this name, if there is one.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<&Tensor> {
        Some(&self.leaves[self.place(name)?])
    }

    fn place(&self, name: &str) -> Option<usize> {
        self.specs.binary_search_by(|spec| spec.name.as_str().cmp(name)).ok()
    }

    /// Where a backward by hand adds to the gradient of this parameter.
    ///
    /// # Panics
    /// As [`Parameters::get`].
    pub(crate) fn slot(&self, name: &str) -> Slot {
        let place = self.place(name).unwrap_or_else(|| panic!("the model has no parameter {name}"));
        self.slots.open(place)
    }

    /// Grows whenever a value is changed.
    pub(crate) fn version(&self) -> i64 {
        self.flat.internal_version()
    }

    /// Runs `of` on the weights of towers with this many layers, in `kind`; they are those of the present values.
    pub(crate) fn with_working<T>(&self, layers: usize, kind: Kind, of: impl FnOnce(&Working) -> T) -> T {
        let mut held = self.working.borrow_mut();
        let current = held.take().filter(|working| working.kind == kind && working.version == self.version());
        of(held.insert(current.unwrap_or_else(|| Working::new(self, layers, kind))))
    }

    /// The towers' weights if they are those of the present values, for a change that keeps them so.
    pub(crate) fn take_working(&mut self) -> Option<Working> {
        let version = self.version();
        self.working.get_mut().take().filter(|working| working.version == version && working.kind == Kind::BFloat16)
    }

    /// Gives back what [`Parameters::take_working`] gave; its parts have followed the values, whose version has not
    /// changed.
    pub(crate) fn keep_working(&mut self, working: Option<Working>) {
        *self.working.get_mut() = working;
    }

    /// Names and leaves, sorted by name, then the table of item vectors.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        let items = self.items.as_ref().map(|items| (items.spec.name.as_str(), &items.values));
        self.names().zip(&self.leaves).chain(items)
    }

    /// `[N, D]`: the table of item vectors, if the model has one.
    #[must_use]
    pub fn item_vectors(&self) -> Option<&Tensor> {
        self.items.as_ref().map(|items| &items.values)
    }

    /// The vectors `[U, D]` of these items; their gradients come with [`Parameters::row_gradient`].
    #[must_use]
    pub fn take_item_vectors(&self, items: &[u32]) -> Option<Tensor> {
        let table = self.items.as_ref()?;
        let index: Vec<i64> = items.iter().map(|&item| item.into()).collect();
        Some(table.take(&Tensor::from_slice(&index).to_device(self.device())))
    }

    /// Keeps the vectors of these items (bool, `[N]`) as they are.
    pub fn freeze_item_vectors(&mut self, items: &Tensor) {
        if let Some(table) = &mut self.items {
            table.freeze(items);
        }
    }

    /// The gradient of the item vectors that backward passes have collected since the last call; none without a table.
    #[must_use]
    pub fn row_gradient(&self) -> Option<RowGradient> {
        self.items.as_ref().map(ItemVectors::gradient)
    }

    /// Names and the parts of another buffer of this layout (moments, gradients), as views.
    pub fn parts<'a>(&'a self, flat: &'a Tensor) -> impl Iterator<Item = (&'a str, Tensor)> {
        self.names().zip(views(&self.specs, flat))
    }

    /// `[P]`: all values but the item vectors; the leaves are views into it.
    pub fn flat(&self) -> &Tensor {
        &self.flat
    }

    pub fn kind(&self) -> Kind {
        self.flat.kind()
    }

    pub fn device(&self) -> Device {
        self.flat.device()
    }

    /// P, the number of values in the flat buffers.
    pub fn count(&self) -> i64 {
        self.flat.size()[0]
    }

    /// A digest of names and shapes: ranks that have the same one may add their flat gradients.
    #[must_use]
    pub fn signature(&self) -> u64 {
        let specs = self.all_specs();
        let parts = specs.iter().flat_map(|spec| {
            let sizes = spec.shape.iter().map(|size| size.cast_unsigned());
            [random::text_key(&spec.name), spec.shape.len() as u64].into_iter().chain(sizes)
        });
        random::key(&parts.collect::<Vec<_>>())
    }

    /// A digest of the parts in which the gradient is summed: ranks must have the same ones.
    #[must_use]
    pub fn bucket_signature(&self) -> u64 {
        random::key(&self.buckets.iter().map(|bucket| bucket.elements.end as u64).collect::<Vec<_>>())
    }

    /// The parts in which the gradient is summed over the ranks, from its first number to its last.
    pub fn buckets(&self) -> &[Bucket] {
        &self.buckets
    }

    /// Neighbours are one bucket up to `small` numbers.
    #[cfg(test)]
    pub(crate) fn cut_buckets(&mut self, small: usize) {
        self.buckets = buckets::buckets(&self.specs, small);
    }

    /// Whether the gradient can lie in memory that other ranks read.
    #[must_use]
    pub fn can_place_gradient(&self) -> bool {
        self.device() == Device::Cpu && self.kind() == Kind::Float
    }

    /// Lets gradients be collected in this memory of `[P]` numbers, or in libtorch's own. What was collected is gone,
    /// and the memory used before is not written to again; tensors over it that [`Parameters::gradients_into_flat`]
    /// gave are no longer to be used.
    ///
    /// # Panics
    /// The memory has another length.
    pub fn place_gradient(&mut self, memory: Option<Arc<OwnVector>>) {
        self.leaves.iter_mut().filter(|leaf| leaf.grad().defined()).for_each(Tensor::zero_grad);
        if memory.is_none() && self.gradient_memory.is_none() {
            self.slots.close();
            return;
        }
        // what was there goes before there is more
        self.slots = Slots::new(Vec::new());
        self.gradient = Tensor::new();
        self.gradient = match &memory {
            Some(memory) => {
                assert!(memory.len() == self.flat.numel(), "{} numbers for {}", memory.len(), self.flat.numel());
                learn_torch::over(memory)
            }
            None => zeros_like(&self.flat),
        };
        self.slots = Slots::new(views(&self.specs, &self.gradient).collect());
        self.gradient_memory = memory;
    }

    /// Moves what backward passes have collected since the last call into one buffer `[P]` and returns it; 0 where a
    /// parameter took no part. What was added by hand is there already. The buffer is reused by the next call, and it
    /// lies in memory that [`Parameters::place_gradient`] may have lent.
    pub fn gradients_into_flat(&self) -> Tensor {
        self.collect(0..self.leaves.len());
        self.close_gradient()
    }

    /// Moves what backward passes have collected for one of [`Parameters::buckets`], which is whole, to where
    /// [`Parameters::bucket_gradient`] is. After the last of them [`Parameters::close_gradient`] begins a new one.
    pub fn collect_bucket(&self, bucket: &Bucket) {
        self.collect(bucket.places.clone());
    }

    /// The place of a bucket's gradient.
    pub fn bucket_gradient(&self, bucket: &Bucket) -> Tensor {
        self.gradient.narrow(0, bucket.elements.start as i64, bucket.elements.len() as i64)
    }

    /// The whole gradient `[P]`, whose buckets have all been collected; what is collected from here on is a new one.
    pub fn close_gradient(&self) -> Tensor {
        self.slots.close();
        self.gradient.shallow_clone()
    }

    /// Moves what libtorch has collected for these parameters into the buffer.
    fn collect(&self, places: Range<usize>) {
        tch::no_grad(|| {
            for place in places {
                let mut leaf = self.leaves[place].shallow_clone();
                let gradient = leaf.grad();
                let slot = self.slots.open(place);
                if gradient.defined() {
                    slot.add(&gradient);
                    leaf.zero_grad();
                } else {
                    drop(slot.zeroed());
                }
            }
        });
    }

    /// Adds to the collected gradient of a learned logit scale; nothing if it is not learned.
    ///
    /// Each rank adds the part that its own rows made (`d_log_scale` of InfoNCE), so the sum over ranks is the whole.
    pub fn add_logit_scale_gradient(&self, gradient: &Tensor) {
        if let Some(leaf) = self.find(crate::pch::LOGIT_SCALE) {
            (leaf * gradient.detach().to_kind(leaf.kind())).backward();
        }
    }
}

/// What keeps tensors from being exactly the parameters of a PCH.
#[must_use]
pub fn mismatch(shape: &PchShape, tensors: &[(String, Tensor)]) -> Mismatch {
    mismatch::sift(&shape.specs(), tensors).1
}

fn zeros_like(flat: &Tensor) -> Tensor {
    learn_torch::in_large_pages(flat.empty_like()).fill_(0.0)
}

/// Those of the flat buffers, sorted by name, and that of the table of item vectors.
fn parted(specs: Vec<ParameterSpec>) -> (Vec<ParameterSpec>, Option<ParameterSpec>) {
    let is_table = |spec: &ParameterSpec| matches!(spec.role, Role::ItemVector { .. });
    let (mut tables, mut specs): (Vec<_>, Vec<_>) = specs.into_iter().partition(is_table);
    specs.sort_by(|left, right| left.name.cmp(&right.name));
    (specs, tables.pop())
}

/// The parts of a flat buffer in their shapes.
fn views(specs: &[ParameterSpec], flat: &Tensor) -> impl Iterator<Item = Tensor> {
    specs.iter().scan(0, |start, spec| {
        let part = flat.narrow(0, *start, spec.count()).view(spec.shape.as_slice());
        *start += spec.count();
        Some(part)
    })
}

/// Fills the targets, which have the shapes of `specs`, from named tensors; on an error nothing is changed.
pub(crate) fn copy_by_name(
    specs: &[ParameterSpec],
    targets: impl Iterator<Item = Tensor>,
    tensors: Vec<(String, Tensor)>,
) -> Result<(), ModelError> {
    let given = mismatch::compare(specs, &tensors).map_err(ModelError::Weights)?;
    tch::no_grad(|| {
        for (mut target, tensor) in targets.zip(&given) {
            target.copy_(&tensor.detach());
        }
    });
    Ok(())
}

/// Standard normals times `std` (Box and Muller, 1958).
fn normals(mut draws: Draws, count: usize, std: f64) -> Vec<f32> {
    let mut values = Vec::with_capacity(count + 1);
    while values.len() < count {
        let radius = (-2.0 * draws.unit().ln()).sqrt() * std;
        let (sin, cos) = (TAU * draws.unit()).sin_cos();
        values.extend([(radius * cos) as f32, (radius * sin) as f32]);
    }
    values.truncate(count);
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    fn specs() -> Vec<ParameterSpec> {
        vec![
            ParameterSpec::new("z.weight", &[300, 40], Role::Weight { std: 0.02 }),
            ParameterSpec::new("a.bias", &[7], Role::Bias),
            ParameterSpec::new("norm.weight", &[5], Role::NormScale),
            ParameterSpec::new("logit_scale", &[], Role::LogitScale { start: 3.0 }),
        ]
    }

    #[test]
    fn initial_values_depend_on_seed_and_name_only() {
        let all = Parameters::init_specs(specs(), 4, Device::Cpu);
        let alone = Parameters::init_specs(specs().drain(..1).collect(), 4, Device::Cpu);
        assert_eq!(all.get("z.weight"), alone.get("z.weight"));
        let other = Parameters::init_specs(specs(), 5, Device::Cpu);
        assert_ne!(all.get("z.weight"), other.get("z.weight"));
        let weight = all.get("z.weight");
        // 12,000 draws: the mean is within 4 standard errors, the deviation within 4 of its own
        assert!(weight.mean(Kind::Double).double_value(&[]).abs() < 4.0 * 0.02 / 12_000_f64.sqrt());
        assert!((weight.std(true).double_value(&[]) / 0.02 - 1.0).abs() < 4.0 / 24_000_f64.sqrt());
        assert_eq!(all.get("a.bias").sum(Kind::Float).double_value(&[]), 0.0);
        assert_eq!(all.get("norm.weight").sum(Kind::Float).double_value(&[]), 5.0);
        assert_eq!(all.get("logit_scale").double_value(&[]), 3.0);
        assert_eq!(all.names().collect::<Vec<_>>(), ["a.bias", "logit_scale", "norm.weight", "z.weight"]);
        assert_eq!(all.count(), 12_013);
    }

    #[test]
    fn leaves_and_flat_are_the_same_memory() {
        let all = Parameters::init_specs(specs(), 1, Device::Cpu);
        let _ = tch::no_grad(|| all.flat().shallow_clone().fill_(2.0));
        assert_eq!(all.get("z.weight").double_value(&[17, 3]), 2.0);
        assert!(all.get("z.weight").requires_grad() && all.get("z.weight").is_leaf());
    }

    #[test]
    fn gradients_are_collected_once_and_zero_where_there_is_none() {
        let all = Parameters::init_specs(specs(), 1, Device::Cpu);
        for _ in 0..2 {
            (all.get("a.bias") * 3.0).sum(Kind::Float).backward();
        }
        all.add_logit_scale_gradient(&Tensor::from(0.5_f32));
        let first = all.gradients_into_flat().copy();
        let bias: Vec<f32> = (&first.narrow(0, 0, 7)).try_into().unwrap();
        assert_eq!(bias, [6.0; 7]);
        assert_eq!(first.double_value(&[7]), 0.5);
        assert_eq!(first.narrow(0, 8, 12_005).abs().max().double_value(&[]), 0.0);
        assert_eq!(all.gradients_into_flat().abs().max().double_value(&[]), 0.0);
    }

    #[test]
    fn loading_lists_everything_that_does_not_fit_and_changes_nothing() {
        let mut all = Parameters::init_specs(specs(), 1, Device::Cpu);
        let before = all.flat().copy();
        let copies: Vec<_> = all.iter().map(|(name, leaf)| (name.to_owned(), leaf.detach().copy())).collect();
        let again = Parameters::load_specs(specs(), copies, Kind::Double, Device::Cpu).unwrap();
        assert_eq!(again.flat().to_kind(Kind::Float), before);
        assert_eq!(again.signature(), all.signature());

        let bad = vec![
            ("a.bias".into(), Tensor::ones([8], (Kind::Float, Device::Cpu))),
            ("norm.weight".into(), Tensor::ones([5], (Kind::Float, Device::Cpu))),
            ("stranger".into(), Tensor::ones([1], (Kind::Float, Device::Cpu))),
            ("z.weight".into(), Tensor::ones([300, 40], (Kind::Int64, Device::Cpu))),
        ];
        let error = all.assign(bad).unwrap_err().to_string();
        for part in
            ["missing: logit_scale", "unexpected: stranger", "a.bias is [8] instead of [7]", "z.weight is Int64"]
        {
            assert!(error.contains(part), "{error}");
        }
        assert_eq!(*all.flat(), before);
    }

    #[test]
    fn the_signature_tells_layouts_apart() {
        let of = |change: fn(&mut Vec<ParameterSpec>)| {
            let mut changed = specs();
            change(&mut changed);
            Parameters::init_specs(changed, 1, Device::Cpu).signature()
        };
        let same = of(|_| ());
        assert_eq!(same, of(|specs| specs.reverse()));
        assert_ne!(same, of(|specs| specs[0].shape = vec![40, 300]));
        assert_ne!(same, of(|specs| specs[1].name = "b.bias".into()));
    }
}
