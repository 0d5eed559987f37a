// SPDX-License-Identifier: GPL-2.0
//! Names of the kernel's taint flags (`Documentation/admin-guide/tainted-kernels.rst`).

use anyhow::{Result, bail};

/// Flag letters by bit.
const LETTERS: &str = "PFSRMBUDAWCIOELKXTNJ";

/// `TAINT_WARN`: the kernel has printed a warning.
pub const WARNED: u64 = 1 << 9;

/// Shows a mask as number and letters.
pub fn show(mask: u64) -> String {
    let mut names = String::new();
    for bit in 0..64 {
        if mask & (1 << bit) != 0 {
            names.push(LETTERS.chars().nth(bit).unwrap_or('?'));
        }
    }
    format!("{mask:#x}({names})")
}

/// Reads a mask from letters.
pub fn parse(letters: &str) -> Result<u64> {
    let mut mask = 0;
    for letter in letters.chars() {
        match LETTERS.chars().position(|l| l == letter) {
            Some(bit) => mask |= 1 << bit,
            None => bail!("no taint flag {letter:?}, there are {LETTERS}"),
        }
    }
    Ok(mask)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_and_masks() {
        assert_eq!(parse("ON").ok(), Some(0x41000));
        assert_eq!(show(0x41200), "0x41200(WON)");
        assert_eq!(parse("W").ok(), Some(WARNED));
        assert!(parse("Z").is_err());
    }
}
