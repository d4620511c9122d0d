//! What a decoder's `config.json` says, and what its family adds to that.
//!
//! Input: the parsed file. Output: a [`DecoderShape`]: the numbers, which projections have biases, where attention is
//! windowed. What a file leaves out has its family's default in transformers; what is not implemented is refused by name.

use learn_domain::config::Precision;
use serde::Deserialize;
use serde_json::{Value, json};
use tch::Kind;

use super::super::weights::Wanted;
use super::rope::Rope;

/// Decoders that are Llama with small differences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecoderFamily {
    Llama,
    Mistral,
    /// Qwen2 and Qwen2.5.
    Qwen2,
    Qwen3,
    /// Baichuan and Baichuan2 with 7B parameters.
    Baichuan,
}

#[derive(Debug, Deserialize)]
struct ConfigFile {
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    max_position_embeddings: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    hidden_act: String,
    rms_norm_eps: f64,
    rope_theta: f32,
    #[serde(default)]
    rope_scaling: Value,
    #[serde(default)]
    rope_parameters: Value,
    partial_rotary_factor: Option<f64>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    sliding_window: Option<usize>,
    #[serde(default)]
    use_sliding_window: bool,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
}

/// The numbers of a decoder.
#[derive(Clone, Debug)]
pub struct DecoderShape {
    pub vocabulary: usize,
    pub hidden: usize,
    /// Most tokens of a text.
    pub(in super::super) positions: usize,
    pub(super) layers: usize,
    pub(super) heads: usize,
    /// Heads of keys and values; each serves a group of query heads.
    pub(super) key_heads: usize,
    pub(super) head_width: usize,
    intermediate: usize,
    /// Epsilon of the norms.
    pub(super) epsilon: f64,
    pub(super) rope: Rope,
    /// One matrix for queries, keys and values.
    pub(super) packed: bool,
    /// Queries and keys are normed, head by head.
    pub(super) head_norms: bool,
    input_biases: bool,
    output_bias: bool,
    mlp_bias: bool,
    /// Per layer: how many tokens a token attends to, itself included; `None` = all earlier ones.
    pub(super) windows: Vec<Option<i64>>,
}

impl DecoderFamily {
    /// The family of a `model_type`.
    pub(in super::super) fn of(model_type: &str) -> Option<Self> {
        Some(match model_type {
            "llama" => Self::Llama,
            "mistral" => Self::Mistral,
            "qwen2" => Self::Qwen2,
            "qwen3" => Self::Qwen3,
            "baichuan" => Self::Baichuan,
            _ => return None,
        })
    }

    /// The values of keys that a file leaves out; a null stays a null.
    fn defaults(self) -> Value {
        let mut all = json!({"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10_000.0});
        let own = match self {
            Self::Llama | Self::Baichuan => json!({}),
            Self::Mistral => json!({"num_key_value_heads": 8, "sliding_window": 4096}),
            Self::Qwen2 => json!({"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}),
            Self::Qwen3 => {
                json!({"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128})
            }
        };
        fill(&mut all, own);
        all
    }
}

/// Adds the keys that an object has not got.
fn fill(object: &mut Value, more: Value) {
    if let (Value::Object(object), Value::Object(more)) = (object, more) {
        for (key, value) in more {
            object.entry(key).or_insert(value);
        }
    }
}

impl DecoderShape {
    /// The shape that a `config.json` describes.
    pub(in super::super) fn read(family: DecoderFamily, mut config: Value) -> Result<Self, String> {
        let alibi = config["max_position_embeddings"].is_null() || config["hidden_size"] == 5120;
        if family == DecoderFamily::Baichuan && alibi {
            return Err("is Baichuan with 13B parameters, whose positions are ALiBi; the 7B one is implemented".into());
        }
        fill(&mut config, family.defaults());
        let config: ConfigFile = serde_json::from_value(config).map_err(|error| error.to_string())?;
        if config.hidden_act != "silu" {
            return Err(format!("hidden_act is {:?}; only \"silu\" is implemented", config.hidden_act));
        }
        if let Some(part) = config.partial_rotary_factor.filter(|&part| part != 1.0) {
            return Err(format!("partial_rotary_factor is {part}; only whole heads are turned here"));
        }
        let heads = config.num_attention_heads;
        let key_heads = config.num_key_value_heads.unwrap_or(heads);
        let head_width = config.head_dim.unwrap_or(config.hidden_size / heads.max(1));
        if key_heads == 0 || heads == 0 || !heads.is_multiple_of(key_heads) {
            return Err(format!("num_attention_heads {heads} is not a multiple of num_key_value_heads {key_heads}"));
        }
        if head_width == 0 || !head_width.is_multiple_of(2) {
            return Err(format!("a head of {head_width} numbers cannot be turned in pairs; look at head_dim"));
        }
        if config.vocab_size == 0 || config.hidden_size == 0 || config.max_position_embeddings == 0 {
            return Err("vocab_size, hidden_size or max_position_embeddings leaves no room for text".into());
        }
        let scaling = if config.rope_parameters.is_null() { &config.rope_scaling } else { &config.rope_parameters };
        let bias = config.attention_bias;
        let (input_biases, output_bias) = match family {
            DecoderFamily::Llama | DecoderFamily::Qwen3 => (bias, bias),
            DecoderFamily::Qwen2 => (true, false),
            DecoderFamily::Mistral | DecoderFamily::Baichuan => (false, false),
        };
        Ok(Self {
            rope: Rope::read(config.rope_theta, scaling)?,
            windows: windows(family, &config)?,
            vocabulary: config.vocab_size,
            hidden: config.hidden_size,
            positions: config.max_position_embeddings,
            layers: config.num_hidden_layers,
            heads,
            key_heads,
            head_width,
            intermediate: config.intermediate_size,
            epsilon: config.rms_norm_eps,
            packed: family == DecoderFamily::Baichuan,
            head_norms: family == DecoderFamily::Qwen3,
            input_biases,
            output_bias,
            mlp_bias: family == DecoderFamily::Llama && config.mlp_bias,
        })
    }

    /// The tensors of the decoder. Norms stay f32; the rest is kept as the products need it.
    pub(super) fn wanted(&self, precision: Precision) -> Vec<Wanted> {
        let [hidden, wide, vocabulary] = [self.hidden, self.intermediate, self.vocabulary].map(|size| size as i64);
        let [query, key] = [self.heads, self.key_heads].map(|heads| (heads * self.head_width) as i64);
        let dense_kind = learn_torch::product_kind(precision).unwrap_or(Kind::Float);
        let mut all =
            vec![Wanted { name: "embed_tokens.weight".into(), shape: vec![vocabulary, hidden], kind: dense_kind }];
        let mut projections = vec![
            ("self_attn.o_proj", [hidden, query], self.output_bias),
            ("mlp.gate_proj", [wide, hidden], self.mlp_bias),
            ("mlp.up_proj", [wide, hidden], self.mlp_bias),
            ("mlp.down_proj", [hidden, wide], self.mlp_bias),
        ];
        if self.packed {
            projections.push(("self_attn.W_pack", [query + 2 * key, hidden], false));
        } else {
            let inputs = [("self_attn.q_proj", query), ("self_attn.k_proj", key), ("self_attn.v_proj", key)];
            projections.extend(inputs.map(|(name, rows)| (name, [rows, hidden], self.input_biases)));
        }
        let mut norms = vec![("input_layernorm", hidden), ("post_attention_layernorm", hidden)];
        if self.head_norms {
            norms.extend(["self_attn.q_norm", "self_attn.k_norm"].map(|name| (name, self.head_width as i64)));
        }
        for layer in 0..self.layers {
            for (name, shape, bias) in &projections {
                let at = |part: &str, shape: &[i64]| Wanted {
                    name: format!("layers.{layer}.{name}.{part}"),
                    shape: shape.to_vec(),
                    kind: dense_kind,
                };
                all.push(at("weight", shape));
                if *bias {
                    all.push(at("bias", &shape[..1]));
                }
            }
            let norm = |&(name, width): &(&str, i64)| Wanted {
                name: format!("layers.{layer}.{name}.weight"),
                shape: vec![width],
                kind: Kind::Float,
            };
            all.extend(norms.iter().map(norm));
        }
        all.push(Wanted { name: "norm.weight".into(), shape: vec![hidden], kind: Kind::Float });
        all
    }
}

/// The window of each layer: in Mistral of all, in Qwen of those that `layer_types` names or else of the last ones.
fn windows(family: DecoderFamily, config: &ConfigFile) -> Result<Vec<Option<i64>>, String> {
    let layers = config.num_hidden_layers;
    let window = config.sliding_window.filter(|_| match family {
        DecoderFamily::Mistral => true,
        DecoderFamily::Qwen2 | DecoderFamily::Qwen3 => config.use_sliding_window,
        DecoderFamily::Llama | DecoderFamily::Baichuan => false,
    });
    let Some(window) = window else { return Ok(vec![None; layers]) };
    if window == 0 {
        return Err("sliding_window is 0; a token has to attend to itself".into());
    }
    let window = Some(window as i64);
    match &config.layer_types {
        Some(types) if family != DecoderFamily::Mistral => {
            if types.len() != layers {
                return Err(format!("layer_types names {} layers of {layers}", types.len()));
            }
            let one = |kind: &String| match kind.as_str() {
                "full_attention" => Ok(None),
                "sliding_attention" => Ok(window),
                other => Err(format!("layer_types has {other:?}, which is not implemented")),
            };
            types.iter().map(one).collect()
        }
        _ => {
            let first = if family == DecoderFamily::Mistral { 0 } else { config.max_window_layers.unwrap_or(layers) };
            Ok((0..layers).map(|layer| window.filter(|_| layer >= first)).collect())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(changes: Value) -> Value {
        let mut config = changes;
        fill(
            &mut config,
            json!({"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
                "intermediate_size": 96, "max_position_embeddings": 512, "num_key_value_heads": 2}),
        );
        config
    }

    fn read(model_type: &str, changes: Value) -> Result<DecoderShape, String> {
        DecoderShape::read(DecoderFamily::of(model_type).unwrap(), config(changes))
    }

    fn names(shape: &DecoderShape) -> Vec<String> {
        shape.wanted(Precision::F32).into_iter().map(|wanted| wanted.name).collect()
    }

    #[test]
    fn families_differ_in_biases_norms_and_packing() {
        let has = |model_type: &str, changes: Value, name: &str| {
            names(&read(model_type, changes).unwrap()).contains(&format!("layers.2.{name}"))
        };
        assert!(has("qwen2", json!({}), "self_attn.v_proj.bias") && !has("qwen2", json!({}), "self_attn.o_proj.bias"));
        assert!(!has("llama", json!({}), "self_attn.q_proj.bias"));
        assert!(has("llama", json!({"attention_bias": true}), "self_attn.o_proj.bias"));
        assert!(has("llama", json!({"mlp_bias": true}), "mlp.down_proj.bias"));
        assert!(!has("mistral", json!({"attention_bias": true}), "self_attn.q_proj.bias"));
        assert!(has("qwen3", json!({}), "self_attn.k_norm.weight"));
        let packed = read("baichuan", json!({"num_key_value_heads": null})).unwrap().wanted(Precision::Bf16);
        let packed = packed.iter().find(|wanted| wanted.name == "layers.0.self_attn.W_pack.weight").unwrap();
        assert_eq!((packed.shape.as_slice(), packed.kind), (&[3 * 64, 64][..], Kind::BFloat16));
    }

    #[test]
    fn a_head_is_as_wide_as_the_file_or_the_family_says() {
        let width = |model_type: &str, changes: Value| read(model_type, changes).unwrap().head_width;
        assert_eq!(width("llama", json!({})), 16);
        assert_eq!(width("mistral", json!({"head_dim": 32})), 32);
        assert_eq!(width("mistral", json!({"head_dim": null})), 16);
        assert_eq!(width("qwen3", json!({})), 128);
    }

    #[test]
    fn windows_follow_the_family() {
        let of = |model_type: &str, changes: Value| read(model_type, changes).unwrap().windows;
        let (all, none) = (vec![Some(4096); 3], vec![None; 3]);
        assert_eq!(of("mistral", json!({})), all, "absent is the default of transformers");
        assert_eq!(of("mistral", json!({"sliding_window": null})), none);
        assert_eq!(of("llama", json!({"sliding_window": 8})), none);
        assert_eq!(of("qwen2", json!({"sliding_window": 8})), none);
        let mut qwen = json!({"sliding_window": 8, "use_sliding_window": true, "max_window_layers": 2});
        assert_eq!(of("qwen2", qwen.clone()), [None, None, Some(8)]);
        qwen["layer_types"] = json!(["sliding_attention", "full_attention", "full_attention"]);
        assert_eq!(of("qwen3", qwen.clone()), [Some(8), None, None]);
        qwen["layer_types"][0] = json!("chunked_attention");
        assert!(read("qwen3", qwen).unwrap_err().contains("chunked_attention"));
    }

    #[test]
    fn what_is_not_implemented_is_named() {
        for (model_type, changes, named) in [
            ("llama", json!({"hidden_act": "gelu"}), "hidden_act is \"gelu\""),
            ("llama", json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
            ("llama", json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}), "\"yarn\""),
            ("llama", json!({"num_key_value_heads": 3}), "multiple of num_key_value_heads 3"),
            ("llama", json!({"head_dim": 7}), "look at head_dim"),
            ("llama", json!({"vocab_size": -1}), "invalid value"),
            ("mistral", json!({"sliding_window": 0}), "sliding_window is 0"),
            ("baichuan", json!({"max_position_embeddings": null, "model_max_length": 4096}), "ALiBi"),
            ("baichuan", json!({"hidden_size": 5120}), "ALiBi"),
        ] {
            let error = read(model_type, changes).unwrap_err();
            assert!(error.contains(named), "{error}");
        }
        assert!(DecoderFamily::of("gpt2").is_none());
    }
}
