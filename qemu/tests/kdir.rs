// SPDX-License-Identifier: GPL-2.0
//! What zdvm refuses in a user's kernel tree, by name. The trees are fakes of a few files.
#![allow(clippy::unwrap_used, clippy::expect_used)] // A test may panic.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;
use zdvm::kdir;
use zdvm::kernel::Tree;
use zdvm::matrix::Matrix;

fn write(path: &Path, text: impl AsRef<[u8]>) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn matrix() -> Matrix {
    Matrix::load(Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()).unwrap()
}

fn image(release: &str) -> Vec<u8> {
    let mut bytes = vec![0; 0x400];
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes[0x20e..0x210].copy_from_slice(&0x100_u16.to_le_bytes());
    let text = format!("{release} (zdvm@zdvm) #1");
    bytes[0x300..0x300 + text.len()].copy_from_slice(text.as_bytes());
    bytes
}

/// A tree that looks built, with everything that is required.
fn built(matrix: &Matrix) -> TempDir {
    let dir = TempDir::new().unwrap();
    let rustc = Command::new("rustc").arg("--version").output().unwrap();
    let rustc = String::from_utf8(rustc.stdout).unwrap();
    let mut config: String = matrix
        .requires
        .iter()
        .map(|r| if r.contains('=') { format!("{r}\n") } else { format!("{r}=m\n") })
        .collect();
    config.push_str(&format!("CONFIG_RUSTC_VERSION_TEXT=\"{}\"\n", rustc.trim()));
    write(&dir.path().join("Makefile"), "");
    write(&dir.path().join(".config"), config);
    write(&dir.path().join("include/config/kernel.release"), "7.3.4-mine\n");
    write(&dir.path().join("arch/x86/boot/bzImage"), image("7.3.4-mine"));
    dir
}

#[track_caller]
fn refused(dir: &Path, says: &str) {
    let matrix = matrix();
    let error = kdir::open(&matrix, matrix.kernel("stock").unwrap(), dir, None).unwrap_err();
    let error = format!("{error:#}");
    assert!(error.contains(says), "{error}");
}

fn replace(path: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.contains(from));
    fs::write(path, text.replace(from, to)).unwrap();
}

#[test]
fn a_good_tree_is_taken_as_it_is() {
    let matrix = matrix();
    let dir = built(&matrix);
    let tree = kdir::open(&matrix, matrix.kernel("stock").unwrap(), dir.path(), None).unwrap();
    assert_eq!(tree.release().unwrap(), "7.3.4-mine");
    assert!(!tree.ours);
}

#[test]
fn a_missing_symbol_is_named() {
    let dir = built(&matrix());
    replace(&dir.path().join(".config"), "CONFIG_KUNIT=y", "CONFIG_KUNIT=m");
    refused(dir.path(), "CONFIG_KUNIT=y");
}

#[test]
fn another_rustc_is_named() {
    let dir = built(&matrix());
    replace(&dir.path().join(".config"), "TEXT=\"rustc 1.", "TEXT=\"rustc 9.");
    refused(dir.path(), "was built with rustc 9.");
}

#[test]
fn an_old_image_is_named() {
    let dir = built(&matrix());
    write(&dir.path().join("arch/x86/boot/bzImage"), image("7.3.3"));
    refused(dir.path(), "says it is 7.3.3, its tree says 7.3.4-mine");
    write(&dir.path().join("arch/x86/boot/bzImage"), "no image");
    refused(dir.path(), "is no bzImage");
}

#[test]
fn what_is_no_tree_is_said() {
    let dir = TempDir::new().unwrap();
    refused(dir.path(), "no kernel source there");
    write(&dir.path().join("source/Makefile"), "");
    refused(dir.path(), "is a build directory");
    refused(Path::new("/nonexistent"), "--kdir /nonexistent");
}

#[test]
fn a_tree_configured_in_place_is_not_touched() {
    let dir = built(&matrix());
    fs::remove_file(dir.path().join("arch/x86/boot/bzImage")).unwrap();
    refused(dir.path(), "mrproper");
}

#[test]
fn a_module_of_another_kernel_is_refused() {
    let dir = built(&matrix());
    let module = dir.path().join("x.ko");
    let path = PathBuf::from(dir.path());
    let tree =
        Tree { name: "t".into(), source: path.clone(), objects: path, ours: false, args: vec![] };
    write(&module, "junk\0name=zdmirror\0vermagic=7.3.4-mine SMP mod_unload \0");
    kdir::check_module(&module, &tree).unwrap();
    assert_eq!(kdir::modinfo(&module, "name").unwrap(), "zdmirror");
    write(&module, "junk\0vermagic=7.3.4 SMP mod_unload \0");
    let error = kdir::check_module(&module, &tree).unwrap_err().to_string();
    assert!(error.contains("7.3.4 SMP") && error.contains("7.3.4-mine"), "{error}");
}
