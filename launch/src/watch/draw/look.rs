//! Colours by what they mean; without any where `NO_COLOR` is set.

use ratatui::style::{Color, Modifier, Style};

use crate::watch::view::Tone;

/// How things look. Colours are the terminal's own sixteen, so that they suit its background.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look {
    pub colour: bool,
}

impl Look {
    /// As <https://no-color.org> has it: any value but the empty one asks for none.
    pub fn from_env() -> Self {
        Self { colour: std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()) }
    }

    fn coloured(self, colour: Color) -> Style {
        if self.colour { Style::new().fg(colour) } else { Style::new() }
    }

    pub fn tone(self, tone: Tone) -> Style {
        match tone {
            Tone::Faint => self.dim(),
            Tone::Plain => Style::new(),
            Tone::Good => self.coloured(Color::Green),
            Tone::Warn => self.coloured(Color::Yellow),
            Tone::Bad => self.coloured(Color::Red).add_modifier(Modifier::BOLD),
        }
    }

    pub fn strong(self) -> Style {
        Style::new().add_modifier(Modifier::BOLD)
    }

    pub fn title(self) -> Style {
        self.coloured(Color::Blue).add_modifier(Modifier::BOLD)
    }

    pub fn curve(self) -> Style {
        self.coloured(Color::Cyan)
    }

    pub fn dim(self) -> Style {
        Style::new().add_modifier(Modifier::DIM)
    }
}
