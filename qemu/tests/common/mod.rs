// SPDX-License-Identifier: GPL-2.0
//! What several files of tests share.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Writes a program, which is a script, and the folders above it.
pub fn script(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}
