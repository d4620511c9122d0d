//! What keys do, without a terminal: which part is shown, how far it is scrolled, whether it stands still.

use crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

/// Rows of a page of a list.
const PAGE: usize = 10;

/// A part of the screen that can be had alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pane {
    /// A bit of each.
    #[default]
    All,
    Curves,
    Ranks,
    /// Evaluations, checkpoints and events.
    Events,
}

impl Pane {
    /// In the order of their keys, from `1`.
    pub const EACH: [Self; 4] = [Self::All, Self::Curves, Self::Ranks, Self::Events];

    pub fn name(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Curves => "curves",
            Self::Ranks => "ranks",
            Self::Events => "events",
        }
    }

    fn moved(self, by: usize) -> Self {
        let place = Self::EACH.iter().position(|pane| *pane == self).unwrap_or_default();
        Self::EACH[(place + by) % Self::EACH.len()]
    }
}

/// What somebody has chosen to see.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    pub pane: Pane,
    /// Rows of its list that are above the screen.
    pub scroll: usize,
    /// The screen stands still, while the job goes on.
    pub paused: bool,
    /// The curves are of the newest steps alone.
    pub newest: bool,
}

/// What a key asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Leave,
    Redraw,
    /// Something else has written on the terminal.
    Repaint,
    Nothing,
}

impl Choice {
    /// Takes a key; the list that is scrolled has `rows`.
    pub fn press(&mut self, key: KeyEvent, rows: usize) -> Answer {
        if key.kind == KeyEventKind::Release {
            return Answer::Nothing;
        }
        let before = *self;
        let last = rows.saturating_sub(1);
        match key.code {
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return Answer::Leave,
            KeyCode::Char('q') | KeyCode::Esc => return Answer::Leave,
            KeyCode::Char('l') if key.modifiers.contains(KeyModifiers::CONTROL) => return Answer::Repaint,
            KeyCode::Char('p' | ' ') => self.paused = !self.paused,
            KeyCode::Char('z') => self.newest = !self.newest,
            KeyCode::Char(digit @ '1'..='4') => self.show(Pane::EACH[digit as usize - '1' as usize]),
            KeyCode::Tab => self.show(self.pane.moved(1)),
            KeyCode::BackTab => self.show(self.pane.moved(Pane::EACH.len() - 1)),
            KeyCode::Down | KeyCode::Char('j') => self.scroll = (self.scroll + 1).min(last),
            KeyCode::PageDown => self.scroll = (self.scroll + PAGE).min(last),
            KeyCode::End => self.scroll = last,
            KeyCode::Up | KeyCode::Char('k') => self.scroll = self.scroll.saturating_sub(1),
            KeyCode::PageUp => self.scroll = self.scroll.saturating_sub(PAGE),
            KeyCode::Home => self.scroll = 0,
            _ => {}
        }
        if *self == before { Answer::Nothing } else { Answer::Redraw }
    }

    fn show(&mut self, pane: Pane) {
        if pane != self.pane {
            (self.pane, self.scroll) = (pane, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn press(choice: &mut Choice, code: KeyCode) -> Answer {
        choice.press(KeyEvent::new(code, KeyModifiers::NONE), 25)
    }

    #[test]
    fn keys_leave_choose_scroll_and_hold() {
        let mut choice = Choice::default();
        let interrupt = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
        assert_eq!(choice.press(interrupt, 0), Answer::Leave);
        for code in [KeyCode::Char('q'), KeyCode::Esc] {
            assert_eq!(press(&mut choice, code), Answer::Leave);
            let released = KeyEvent::new_with_kind(code, KeyModifiers::NONE, KeyEventKind::Release);
            assert_eq!(choice.press(released, 0), Answer::Nothing);
        }
        assert_eq!(press(&mut choice, KeyCode::Char('c')), Answer::Nothing);
        let mut panes = Vec::new();
        for _ in 0..4 {
            assert_eq!(press(&mut choice, KeyCode::Tab), Answer::Redraw);
            panes.push(choice.pane);
        }
        assert_eq!(panes, [Pane::Curves, Pane::Ranks, Pane::Events, Pane::All]);
        press(&mut choice, KeyCode::BackTab);
        assert_eq!(choice.pane, Pane::Events);
        press(&mut choice, KeyCode::Char('3'));
        for (code, scroll) in [
            (KeyCode::Up, 0),
            (KeyCode::Down, 1),
            (KeyCode::PageDown, 11),
            (KeyCode::Char('k'), 10),
            (KeyCode::PageDown, 20),
            (KeyCode::PageDown, 24),
            (KeyCode::End, 24),
            (KeyCode::PageUp, 14),
            (KeyCode::Home, 0),
            (KeyCode::End, 24),
        ] {
            press(&mut choice, code);
            assert_eq!((choice.pane, choice.scroll), (Pane::Ranks, scroll), "{code:?}");
        }
        assert_eq!(press(&mut choice, KeyCode::Char('3')), Answer::Nothing, "it is there already");
        press(&mut choice, KeyCode::Char('1'));
        assert_eq!((choice.pane, choice.scroll), (Pane::All, 0), "another list begins at its start");
        for hold in [true, false] {
            press(&mut choice, KeyCode::Char('p'));
            press(&mut choice, KeyCode::Char('z'));
            assert_eq!((choice.paused, choice.newest), (hold, hold));
        }
    }
}
