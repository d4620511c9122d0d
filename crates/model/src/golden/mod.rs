//! Checks the towers and the losses against a golden case: a small float64 case that Hugging Face's `BertEncoder` and
//! PyTorch's autograd computed (`tests/golden/make_golden.py` writes them and describes the layout).
//!
//! The check goes the way of a training step: towers, the objective by hand in tiles, and a backward pass of
//! sum(user * d_user) + sum(item * d_item), whose gradient is that of the loss. Output: the largest absolute error of
//! each group of tensors.

mod objective;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use learn_domain::config::{
    ItemInput, ItemTower, ModelConfig, ObjectiveKind, PositionEmbedding, Precision, Residual, TimeEmbedding,
};
use learn_domain::packing::Packing;
use learn_domain::sampling::Pairs;
use learn_domain::time_gap;
use objective::{Embedded, Towers};
use serde::Deserialize;
use tch::{Device, Kind, Tensor};

use crate::ModelError;
use crate::objective::cvr;
use crate::parameters::{Parameters, RowGradient};
use crate::pch::{Forward, ID_EMBEDDING, ItemInputs, LAYER_NORM_EPS, Pch, PchShape, Sequences};
use crate::safetensors::{self, SafetensorsError};

/// A golden file that cannot be checked.
#[derive(Debug, thiserror::Error)]
pub enum GoldenError {
    #[error(transparent)]
    File(#[from] SafetensorsError),
    #[error("{}: {problem}; write it again with make_golden.py", path.display())]
    Layout { path: PathBuf, problem: String },
    #[error("{}: {source}", path.display())]
    Model { path: PathBuf, source: ModelError },
}

/// The metadata key `config`.
#[derive(Debug, Deserialize)]
struct CaseConfig {
    layers: u32,
    heads: u32,
    hidden: u32,
    input_dim: u32,
    output_dim: u32,
    item_tower: ItemTower,
    logit_scale: f64,
    #[serde(default)]
    learn_logit_scale: bool,
    #[serde(default)]
    kind: ObjectiveKind,
    #[serde(default)]
    pairs: Pairs,
    #[serde(default)]
    cvr_weight: f64,
    layer_norm_eps: f64,
    position_embedding: PositionEmbedding,
    #[serde(default)]
    time_embedding: TimeEmbedding,
    #[serde(default)]
    item_input: ItemInput,
    #[serde(default)]
    centring: bool,
    #[serde(default)]
    residual: Residual,
    #[serde(default)]
    residual_decay: f64,
    #[serde(default)]
    history_code: u32,
    #[serde(default)]
    history_code_weight: f64,
}

/// The file, taken apart.
struct Case {
    path: PathBuf,
    config: CaseConfig,
    tensors: BTreeMap<String, Tensor>,
    device: Device,
    kind: Kind,
}

/// One side (history or targets) of the case: sequences, and what belongs to each sampled position.
struct Side {
    sequences: Sequences,
    /// User of each sampled position.
    user: Vec<i64>,
    /// Item id at each sampled position.
    id: Vec<i64>,
    /// Place of each sampled position in the flattened `[B, N]` of the outputs.
    place: Vec<i64>,
}

/// Largest absolute error, computed in f64 or f32, by group of tensors: `out.user`, `grad.adaptor`, `grad.summary_encoder.layer.0`, …
///
/// # Errors
/// The file cannot be read or does not have the layout.
pub fn check(path: &Path, device: Device, kind: Kind) -> Result<BTreeMap<String, f64>, GoldenError> {
    let case = Case::open(path, device, kind)?;
    let (model, parameters) = case.model()?;
    let (history, target) = (case.side("hist", "user_pos")?, case.side("tar", "item_pos")?);
    let forward = Forward { train: false, precision: Precision::F32 };

    let table = case.tensor("in.table")?;
    let catalogue: Vec<u32> = (0..table.size()[0] as u32).collect();
    let inputs = ItemInputs { items: &catalogue, content: table, id_seed: None, tape: None };
    let items = model.items(&parameters, &inputs, &forward);
    let user = model.user(&parameters, &items, &history.sequences, &forward);
    let towers = Towers {
        model: &model,
        parameters: &parameters,
        forward: &forward,
        items: &items,
        user: &user,
        history: &history,
        target: &target,
    };
    let minimised = towers.minimise(&case)?;
    let index = |values: &[i64]| case.index(values);

    let mut errors = Errors { case: &case, largest: BTreeMap::new() };
    let mut loss = minimised.loss.copy();
    let mut surrogate = (&user * &minimised.d_user).sum(Kind::Double) + &minimised.surrogate;
    if let (Embedded::Targets(item), true) = (&minimised.embedded, case.tensors.contains_key("in.label")) {
        let last = |of: i64| history.user.iter().rposition(|user| *user == of).unwrap_or_default() as i64;
        let users: Vec<i64> = target.user.iter().map(|user| last(*user)).collect();
        let logits = cvr::logits(&parameters, &user.index_select(0, &index(&users)), item);
        let labels = case.tensor("in.label")?.reshape([-1]).index_select(0, &index(&target.place));
        let cvr_loss = cvr::loss(&logits, &labels, target.user.len() as i64);
        errors.compare_at("out.cvr_logit", &logits.unsqueeze(1), &index(&target.place))?;
        errors.compare("out.cvr_loss", &cvr_loss)?;
        surrogate += &cvr_loss * case.config.cvr_weight;
        loss += cvr_loss.detach() * case.config.cvr_weight;
    }
    surrogate.backward();
    parameters.add_logit_scale_gradient(&minimised.d_log_scale);
    let gradient = parameters.gradients_into_flat();

    let rows = parameters.row_gradient();

    errors.compare_at("out.user", &user, &index(&history.place))?;
    match &minimised.embedded {
        Embedded::Targets(item) => errors.compare_at("out.item", item, &index(&target.place))?,
        Embedded::Catalogue(items) => errors.compare("out.catalogue", items)?,
    }
    if case.tensors.contains_key("out.infonce") {
        errors.compare("out.infonce", &minimised.loss)?;
    }
    if case.tensors.contains_key("out.correct") {
        errors.compare("out.correct", &minimised.correct)?;
    }
    errors.compare("out.loss", &loss)?;
    for (name, part) in parameters.parts(&gradient) {
        errors.compare(&format!("grad.{name}"), &part)?;
    }
    if let Some(RowGradient { rows, .. }) = rows {
        // every item of the table was read, so it has a row for each
        errors.compare(&format!("grad.{ID_EMBEDDING}"), &rows)?;
    }
    Ok(errors.largest)
}

impl Case {
    fn open(path: &Path, device: Device, kind: Kind) -> Result<Self, GoldenError> {
        let contents = safetensors::read_all(path)?;
        let layout = |problem: String| GoldenError::Layout { path: path.into(), problem };
        let text =
            contents.metadata.get("config").ok_or_else(|| layout("there is no metadata key \"config\"".into()))?;
        let config: CaseConfig =
            serde_json::from_str(text).map_err(|error| layout(format!("the metadata key \"config\": {error}")))?;
        if config.layer_norm_eps != LAYER_NORM_EPS {
            return Err(layout(format!("layer_norm_eps is {} instead of {LAYER_NORM_EPS}", config.layer_norm_eps)));
        }
        let there = |tensor: Tensor| match tensor.is_floating_point() {
            true => tensor.to_kind(kind).to_device(device),
            false => tensor.to_device(device),
        };
        let tensors = contents.tensors.into_iter().map(|(name, tensor)| (name, there(tensor))).collect();
        Ok(Self { path: path.into(), config, tensors, device, kind })
    }

    fn model(&self) -> Result<(Pch, Parameters), GoldenError> {
        let config = &self.config;
        let failed = |source| GoldenError::Model { path: self.path.clone(), source };
        let model = Pch::new(PchShape {
            input_dim: config.input_dim.into(),
            items: self.tensor("in.table")?.size()[0],
            model: ModelConfig {
                layers: config.layers,
                heads: config.heads,
                hidden: config.hidden,
                output_dim: config.output_dim,
                item_tower: config.item_tower,
                position_embedding: config.position_embedding,
                time_embedding: config.time_embedding,
                logit_scale: config.logit_scale,
                learn_logit_scale: config.learn_logit_scale,
                dropout: 0.0,
                item_input: config.item_input,
                centring: config.centring,
                residual: config.residual,
                residual_decay: config.residual_decay,
                residual_trained: true,
                history_code: config.history_code,
                history_code_weight: config.history_code_weight,
                ..ModelConfig::default()
            },
            max_history: self.tensor("in.hist_id")?.size2().map_err(|error| failed(error.into()))?.1,
            cvr_hidden: self.tensors.get("param.cvr.0.bias").map(|bias| bias.numel() as i64),
        })
        .map_err(failed)?;
        let given = self.tensors.iter().filter_map(|(name, tensor)| {
            name.strip_prefix("param.").map(|name| (name.to_owned(), tensor.shallow_clone()))
        });
        let parameters = Parameters::load(model.shape(), given.collect(), self.kind, self.device).map_err(failed)?;
        Ok((model, parameters))
    }

    fn index(&self, values: &[i64]) -> Tensor {
        Tensor::from_slice(values).to_device(self.device)
    }

    fn layout(&self, name: &str, problem: &dyn std::fmt::Display) -> GoldenError {
        GoldenError::Layout { path: self.path.clone(), problem: format!("{name}: {problem}") }
    }

    fn tensor(&self, name: &str) -> Result<&Tensor, GoldenError> {
        self.tensors.get(name).ok_or_else(|| GoldenError::Layout {
            path: self.path.clone(),
            problem: format!("there is no tensor {name}"),
        })
    }

    /// `[B, N]` integers, by row.
    fn integers(&self, name: &str) -> Result<Vec<Vec<i64>>, GoldenError> {
        Vec::try_from(self.tensor(name)?).map_err(|error: tch::TchError| self.layout(name, &error))
    }

    /// Right-padded rows without their padding, one behind the other.
    fn packed(&self, rows: &[Vec<i64>], packing: &Packing, lengths: &[usize]) -> Tensor {
        let tokens = packing.order.iter().flat_map(|&user| &rows[user][..lengths[user]]);
        self.index(&tokens.copied().collect::<Vec<_>>())
    }

    /// The buckets of a side's times, right-padded, if the case has some.
    fn gaps(&self, name: &str) -> Result<Option<Vec<Vec<i64>>>, GoldenError> {
        if !self.tensors.contains_key(name) {
            return Ok(None);
        }
        let times = self.integers(name)?;
        Ok(Some(times.iter().map(|row| time_gap::buckets(row).map(i64::from).collect()).collect()))
    }

    fn side(&self, sequence: &str, sampled: &str) -> Result<Side, GoldenError> {
        let ids = self.integers(&format!("in.{sequence}_id"))?;
        let positions = self.integers(&format!("in.{sampled}"))?;
        let lengths = self.tensor(&format!("in.{sequence}_len"))?;
        let lengths: Vec<i64> = Vec::try_from(lengths).map_err(|error| self.layout(sequence, &error))?;
        let lengths: Vec<usize> = lengths.into_iter().map(|length| length as usize).collect();
        if let Some(ids) = ids.iter().zip(&lengths).find_map(|(ids, &length)| (ids.len() < length).then_some(ids)) {
            let problem = format!("in.{sequence}_len is longer than a sequence of {}", ids.len());
            return Err(GoldenError::Layout { path: self.path.clone(), problem });
        }
        let packing = Packing::new(&lengths);
        let mut side = Side {
            sequences: Sequences {
                items: self.packed(&ids, &packing, &lengths),
                runs: packing.runs.clone(),
                positions: Tensor::new(),
                gaps: self.gaps(&format!("in.{sequence}_time"))?.map(|gaps| self.packed(&gaps, &packing, &lengths)),
            },
            user: Vec::new(),
            id: Vec::new(),
            place: Vec::new(),
        };
        let mut flat = Vec::new();
        for (user, (ids, positions)) in ids.iter().zip(&positions).enumerate() {
            for (nth, &position) in positions.iter().enumerate().filter(|(_, position)| **position >= 0) {
                let item = usize::try_from(position).ok().and_then(|at| ids.get(at)).ok_or_else(|| {
                    let problem = format!("in.{sampled} has position {position} in a sequence of {}", ids.len());
                    GoldenError::Layout { path: self.path.clone(), problem }
                })?;
                flat.push(packing.starts[user] as i64 + position);
                side.user.push(user as i64);
                side.id.push(*item);
                side.place.push((user * positions.len() + nth) as i64);
            }
        }
        side.sequences.positions = Tensor::from_slice(&flat).to_device(self.device);
        Ok(side)
    }
}

/// Collects the largest error of each group.
struct Errors<'a> {
    case: &'a Case,
    largest: BTreeMap<String, f64>,
}

impl Errors<'_> {
    /// Compares with the file's tensor of this name.
    fn compare(&mut self, name: &str, ours: &Tensor) -> Result<(), GoldenError> {
        let theirs = self.case.tensor(name)?;
        let gap = if theirs.numel() == ours.numel() {
            (ours.detach().reshape([-1]) - theirs.reshape([-1])).abs().max().double_value(&[])
        } else {
            f64::INFINITY
        };
        let largest = self.largest.entry(group(name)).or_insert(0.0);
        // a NaN is the worst error there is
        *largest = if gap.is_nan() { f64::INFINITY } else { largest.max(gap) };
        Ok(())
    }

    /// Compares rows with the places of `[B, N, ..]` that they belong to, and the other places with 0.
    fn compare_at(&mut self, name: &str, rows: &Tensor, places: &Tensor) -> Result<(), GoldenError> {
        let size = self.case.tensor(name)?.size();
        let whole = Tensor::zeros([size[0] * size[1], rows.size()[1]], (rows.kind(), rows.device()));
        self.compare(name, &whole.index_copy(0, places, &rows.detach()))
    }
}

/// `grad.mlp.0.bias` belongs to `grad.mlp`, a layer's tensors to their layer, an output to itself.
fn group(name: &str) -> String {
    let parts = match name.starts_with("grad.summary_encoder.layer.") {
        true => 4,
        false => 2,
    };
    name.split('.').take(parts).collect::<Vec<_>>().join(".")
}
