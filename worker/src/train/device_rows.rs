//! The rows of content embeddings that stay on the device.
//!
//! Input: the rows of each pass as the feed has prepared them, in its order: what is on the device already, what comes with
//! it, and what of that stays. Output: the pass's rows on the device. Which rows stay is decided where they are fetched
//! ([`crate::feed::residents`]), so rows that are here are not even looked up on the host.

use tch::{Device, Kind, Tensor};

use crate::feed::{OnDevice, PassRows};

/// A table of rows on the device.
#[derive(Debug)]
pub struct DeviceRows {
    capacity: usize,
    dim: usize,
    device: Device,
    /// `[capacity, dim]` f16, made when the first row stays.
    table: Option<Tensor>,
}

impl DeviceRows {
    /// Room for `capacity` rows of `dim` values.
    #[must_use]
    pub fn new((capacity, dim): (usize, usize), device: Device) -> Self {
        Self { capacity, dim, device, table: None }
    }

    /// Where the rows are wanted.
    #[must_use]
    pub fn device(&self) -> Device {
        self.device
    }

    /// The rows `[U, dim]` of a pass with so many unique items, f16.
    pub fn take(&mut self, rows: &PassRows, items: usize) -> Tensor {
        let held = rows.on_device.as_ref().map_or(0, |on_device| on_device.held.iter().flatten().count());
        let sent = rows.sent.on(self.device, (items - held, self.dim));
        match &rows.on_device {
            None => sent,
            Some(on_device) => self.merge(on_device, sent),
        }
    }

    /// Puts together what is here and what was `sent` `[F, dim]`, and keeps of that what shall stay.
    fn merge(&mut self, on_device: &OnDevice, sent: Tensor) -> Tensor {
        let numbers = |values: &[i64]| learn_torch::on_device(values, self.device);
        let split = |is_held: bool| -> Vec<i64> {
            let places = on_device.held.iter().enumerate().filter(|(_, slot)| slot.is_some() == is_held);
            places.map(|(place, _)| place as i64).collect()
        };
        let slots: Vec<i64> = on_device.held.iter().flatten().map(|&slot| slot as i64).collect();
        let shape = [self.capacity as i64, self.dim as i64];
        let table = self.table.get_or_insert_with(|| Tensor::zeros(shape, (Kind::Half, self.device)));
        let all = if slots.is_empty() {
            sent.shallow_clone()
        } else {
            let held = table.index_select(0, &numbers(&slots));
            let mut all = Tensor::empty([on_device.held.len() as i64, self.dim as i64], (Kind::Half, self.device));
            let _ = all.index_copy_(0, &numbers(&split(true)), &held);
            let _ = all.index_copy_(0, &numbers(&split(false)), &sent);
            all
        };
        if !on_device.kept.is_empty() {
            let (rows, slots): (Vec<i64>, Vec<i64>) =
                on_device.kept.iter().map(|&(row, slot)| (row as i64, slot as i64)).unzip();
            let _ = table.index_copy_(0, &numbers(&slots), &sent.index_select(0, &numbers(&rows)));
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use half::f16;
    use learn_domain::random::Draws;
    use learn_torch::HostRows;
    use tch::IndexOp;

    use super::*;
    use crate::feed::residents::Residents;

    #[test]
    fn passes_get_their_rows_whether_they_are_here_or_sent() {
        const DIM: usize = 3;
        const CAPACITY: usize = 6;
        let value = |item: u32, place: usize| f16::from_f32((item * 10 + place as u32) as f32);
        let of = |items: &[u32]| -> Vec<f16> {
            items.iter().flat_map(|&item| (0..DIM).map(move |place| value(item, place))).collect()
        };
        let mut draws = Draws::new(&[3]);
        // the later an item, the more it occurs: within a pass one makes room for another
        let mut choice = Residents::new(CAPACITY, (0..20).collect::<Vec<u32>>().into());
        let mut rows = DeviceRows::new((CAPACITY, DIM), Device::Cpu);
        let mut passes: Vec<Vec<u32>> = (0..40).map(|_| (0..20).filter(|_| draws.below(3) == 0).collect()).collect();
        passes.push(Vec::new());
        passes.iter().take(30).for_each(|items| choice.announce(items));
        let mut sent = 0;
        for items in &passes {
            let (on_device, missing) = OnDevice::of(&mut choice, items);
            let slots: BTreeSet<usize> = on_device.kept.iter().map(|&(_, slot)| slot).collect();
            assert_eq!(slots.len(), on_device.kept.len(), "a row of the table is written once");
            let pass = PassRows { sent: of(&missing).as_slice().into(), on_device: Some(on_device) };
            let got = rows.take(&pass, items.len());
            assert_eq!(got.size(), [items.len() as i64, DIM as i64]);
            assert_eq!(Vec::<f16>::try_from(got.reshape([-1])).unwrap(), of(items));
            sent += missing.len();
        }
        let all: usize = passes.iter().map(Vec::len).sum();
        assert!(sent < all * 9 / 10, "{sent} of {all} were sent");
        let plain = rows.take(&HostRows::from(&of(&[4, 7])[..]).into(), 2);
        assert_eq!(Vec::<f16>::try_from(plain.i(1)).unwrap(), of(&[7]));
    }
}
