//! `report`: one page about one run or several, side by side.
//!
//! Input: run directories, whatever state they are in. Output: one HTML file without outside resources. Shape: [`load`] reads
//! all that can be read and names what cannot, [`data`] makes curves of it, [`page`] writes tables and text, all as pure
//! functions of what was read; `page.js` draws the curves where the page is opened. Invariant: a damaged run takes nothing from
//! the others.

mod data;
mod load;
mod page;

pub use load::RunFacts;
pub use page::html;

#[cfg(test)]
mod tests;
