//! The flat gradient in parts that are summed over the ranks one by one, while the backward goes on.
//!
//! Input: names and sizes of the parameters. Output: parts of the buffer, and when a backward has finished with each.
//! Invariants: the parts cover the buffer without overlap; they are a pure function of names and shapes, so every rank
//! has the same ones.

use std::cmp::Reverse;
use std::ops::Range;

use super::ParameterSpec;
use crate::by_hand::DenseNames;
use crate::pch::LAYER_PREFIX;

/// Neighbours are one part up to so many numbers, because a sum over ranks has a cost of its own, whatever its length.
pub(super) const SMALL: usize = 1 << 20;

/// A point on the way of a backward, in the order in which it comes by. The gradient of what is named is whole then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Milestone {
    /// The layer behind the encoder.
    Projection,
    /// The encoder's layer of this number, counted from its input.
    Layer(Reverse<u32>),
    /// All parameters.
    End,
}

/// A part of the flat gradient.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// Its numbers.
    pub elements: Range<usize>,
    /// When it is whole.
    pub whole_at: Milestone,
    /// Its parameters, by their order.
    pub(super) places: Range<usize>,
}

impl Milestone {
    fn of(name: &str) -> Self {
        let layer = name.strip_prefix(LAYER_PREFIX).and_then(|rest| rest.split('.').next()?.parse().ok());
        match layer {
            Some(layer) => Self::Layer(Reverse(layer)),
            None if [DenseNames::PROJECTION.weight, DenseNames::PROJECTION.bias].contains(&name) => Self::Projection,
            None => Self::End,
        }
    }
}

/// Parts of the buffer of these parameters, from its first number to its last; neighbours are one up to `small` numbers.
pub(super) fn buckets(specs: &[ParameterSpec], small: usize) -> Vec<Bucket> {
    let mut all: Vec<Bucket> = Vec::new();
    let mut start = 0;
    for (place, spec) in specs.iter().enumerate() {
        let elements = start..start + usize::try_from(spec.count()).unwrap_or_default();
        let whole_at = Milestone::of(&spec.name);
        start = elements.end;
        match all.last_mut().filter(|last| last.whole_at == whole_at) {
            Some(last) => last.extend(&elements, place..place + 1, whole_at),
            None => all.push(Bucket { elements, whole_at, places: place..place + 1 }),
        }
    }
    let mut merged: Vec<Bucket> = Vec::new();
    for next in all {
        match merged.last_mut().filter(|last| last.elements.len() + next.elements.len() <= small) {
            Some(last) => last.extend(&next.elements, next.places, next.whole_at),
            None => merged.push(next),
        }
    }
    merged
}

impl Bucket {
    /// Goes on with what lies behind it.
    fn extend(&mut self, elements: &Range<usize>, places: Range<usize>, whole_at: Milestone) {
        self.elements.end = elements.end;
        self.places.end = places.end;
        self.whole_at = self.whole_at.max(whole_at);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Role;

    fn sorted(sizes: &[(String, i64)]) -> Vec<ParameterSpec> {
        let mut specs: Vec<_> =
            sizes.iter().map(|(name, size)| ParameterSpec::new(name.clone(), &[*size], Role::Bias)).collect();
        specs.sort_by(|one, other| one.name.cmp(&other.name));
        specs
    }

    fn model(layers: u32, layer: i64) -> Vec<ParameterSpec> {
        let mut sizes = vec![
            ("adaptor.weight".to_owned(), 3 << 20),
            ("logit_scale".to_owned(), 1),
            ("mlp.0.bias".to_owned(), 64),
            ("mlp.0.weight".to_owned(), 2 << 20),
        ];
        for number in 0..layers {
            sizes.push((format!("{LAYER_PREFIX}{number}.output.dense.bias"), 768));
            sizes.push((format!("{LAYER_PREFIX}{number}.output.dense.weight"), layer));
        }
        sorted(&sizes)
    }

    #[test]
    fn a_deep_tower_goes_layer_by_layer_and_a_small_one_as_a_whole() {
        let of =
            |specs: &[ParameterSpec]| buckets(specs, SMALL).iter().map(|bucket| bucket.whole_at).collect::<Vec<_>>();
        let layer = |number| Milestone::Layer(Reverse(number));
        // by name: layer 10 stands before layer 2
        let mut deep = vec![Milestone::End, Milestone::Projection, layer(0), layer(1), layer(10)];
        deep.extend((2..10).map(layer));
        assert_eq!(of(&model(11, 2 << 20)), deep);
        // the neighbours 0 to 2 are one part, which is whole with the lowest of them
        assert_eq!(of(&model(4, 1 << 18)), [Milestone::End, Milestone::Projection, layer(0), layer(3)]);
        assert_eq!(of(&sorted(&[("mlp.0.bias".into(), 7), ("cvr.0.bias".into(), 9)])), [Milestone::End]);
        assert_eq!(of(&[]), []);
        let mut order = deep;
        order.sort_unstable();
        assert_eq!((order[0], order[1], order[12]), (Milestone::Projection, layer(10), Milestone::End));
    }

    proptest! {
        #[test]
        fn buckets_cover_the_buffer(sizes in prop::collection::vec((0u32..6, 0i64..(2 << 20)), 0..12)) {
            let named = |(place, &(kind, size)): (usize, &(u32, i64))| match kind {
                0 => ("mlp.0.weight".to_owned(), size),
                1 => (format!("other.{place}"), size),
                layer => (format!("{LAYER_PREFIX}{layer}.{place}"), size),
            };
            let specs = sorted(&sizes.iter().enumerate().map(named).collect::<Vec<_>>());
            let all = buckets(&specs, SMALL);
            let (mut element, mut place) = (0, 0);
            for bucket in &all {
                prop_assert_eq!((bucket.elements.start, bucket.places.start), (element, place));
                let mine = &specs[bucket.places.clone()];
                prop_assert_eq!(mine.iter().map(|spec| spec.count() as usize).sum::<usize>(), bucket.elements.len());
                let latest = mine.iter().map(|spec| Milestone::of(&spec.name)).max();
                prop_assert_eq!(latest, Some(bucket.whole_at));
                (element, place) = (bucket.elements.end, bucket.places.end);
            }
            prop_assert_eq!(place, specs.len());
            // neighbours are two only if they would be too large as one
            prop_assert!(all.windows(2).all(|two| two[1].elements.end - two[0].elements.start > SMALL));
        }
    }
}
