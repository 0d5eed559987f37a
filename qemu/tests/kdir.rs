// SPDX-License-Identifier: GPL-2.0
//! The faults that zdvm refuses in a user's kernel tree. The trees are imitations of a few files.
#![allow(clippy::unwrap_used, clippy::expect_used)] // A test may panic.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;
use zdvm::kernel::Tree;
use zdvm::kernel::kdir::{self, Configured};
use zdvm::plan::matrix::Matrix;

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

/// Builds an "image" with the content of its only source.
const MAKEFILE: &str = "\
VERSION = 7
PATCHLEVEL = 3
bzImage: arch/x86/boot/bzImage
modules:
arch/x86/boot/bzImage: mm/memory.c
\tcp mm/memory.c $@
\tfor f in said; do echo \"$(LLVM) $(CC)\" > $$f; done
.PHONY: bzImage modules
";

/// Makes a tree that looks built, with every required symbol.
fn built(matrix: &Matrix) -> TempDir {
    let dir = TempDir::new().unwrap();
    let rustc = Command::new("rustc").arg("--version").output().unwrap();
    let rustc = String::from_utf8(rustc.stdout).unwrap();
    let mut config: String = matrix
        .requires
        .iter()
        .map(|r| if r.contains('=') { format!("{r}\n") } else { format!("{r}=m\n") })
        .collect();
    let cc = Command::new("gcc").arg("--version").output().unwrap();
    let cc = String::from_utf8(cc.stdout).unwrap();
    config.push_str(&format!("CONFIG_CC_VERSION_TEXT=\"{}\"\n", cc.lines().next().unwrap()));
    config.push_str(&format!("CONFIG_RUSTC_VERSION_TEXT=\"{}\"\n", rustc.trim()));
    write(&dir.path().join("Makefile"), MAKEFILE);
    write(&dir.path().join("mm/memory.c"), image("7.3.4-mine"));
    write(&dir.path().join("rust/libkernel.rmeta"), "");
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
    refused(dir.path(), "make kconfig KDIR=");
}

#[test]
fn other_compilers_are_named() {
    let dir = built(&matrix());
    replace(&dir.path().join(".config"), "TEXT=\"rustc 1.", "TEXT=\"rustc 9.");
    refused(dir.path(), "was built with \"rustc 9.");
    let dir = built(&matrix());
    replace(&dir.path().join(".config"), "TEXT=\"gcc ", "TEXT=\"gcc-3 ");
    refused(dir.path(), "was built with \"gcc-3 ");
}

#[test]
fn clang_is_used_where_the_tree_was_built_with_it() {
    let dir = built(&matrix());
    let clang = Command::new("clang").arg("--version").output().unwrap();
    let clang = String::from_utf8(clang.stdout).unwrap();
    let config = fs::read_to_string(dir.path().join(".config")).unwrap();
    let gcc = config.lines().find(|l| l.starts_with("CONFIG_CC_VERSION_TEXT")).unwrap();
    let text = format!("CONFIG_CC_VERSION_TEXT=\"{}\"", clang.lines().next().unwrap());
    let text = format!("CONFIG_CC_IS_CLANG=y\nCONFIG_LD_IS_LLD=y\n{text}");
    write(&dir.path().join(".config"), config.replace(gcc, &text));
    fs::remove_file(dir.path().join("arch/x86/boot/bzImage")).unwrap();
    let matrix = matrix();
    let tree = kdir::open(&matrix, matrix.kernel("stock").unwrap(), dir.path(), None).unwrap();
    assert_eq!(tree.args, ["LLVM=1"]);
    assert!(fs::read_to_string(dir.path().join("said")).unwrap().starts_with("1 "));
}

/// The image of the previous source must never be judged.
#[test]
fn an_edited_source_is_built_before_it_is_booted() {
    let matrix = matrix();
    let dir = built(&matrix);
    let open = || kdir::open(&matrix, matrix.kernel("stock").unwrap(), dir.path(), None);
    let booted = || fs::read(open().unwrap().image()).unwrap();
    assert_eq!(booted(), image("7.3.4-mine"));
    let mut edited = image("7.3.4-mine");
    edited.extend_from_slice(b"a change in mm/");
    write(&dir.path().join("mm/memory.c"), &edited);
    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(2);
    let source = fs::File::options().write(true).open(dir.path().join("mm/memory.c")).unwrap();
    source.set_modified(later).unwrap();
    assert_eq!(booted(), edited);
    // A source that does not compile is an error, and the old image is not used.
    replace(&dir.path().join("Makefile"), "cp mm/memory.c", "false");
    let much_later = later + std::time::Duration::from_secs(2);
    source.set_modified(much_later).unwrap();
    assert!(open().is_err());
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
fn what_cannot_work_is_refused_in_one_sentence() {
    let dir = built(&matrix());
    replace(&dir.path().join("Makefile"), "PATCHLEVEL = 3", "PATCHLEVEL = 1");
    refused(dir.path(), "is Linux 7.1: zdmirror needs 7.2 or newer");
    let dir = built(&matrix());
    fs::remove_file(dir.path().join("rust/libkernel.rmeta")).unwrap();
    refused(dir.path(), "rust/libkernel.rmeta is not there");
    let dir = built(&matrix());
    replace(
        &dir.path().join(".config"),
        "CONFIG_RUST=y",
        "CONFIG_RUST=y\nCONFIG_CMDLINE_OVERRIDE=y",
    );
    refused(dir.path(), "CONFIG_CMDLINE_OVERRIDE");
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
fn a_tree_configured_in_place_is_built_in_place() {
    let matrix = matrix();
    let dir = built(&matrix);
    fs::remove_file(dir.path().join("arch/x86/boot/bzImage")).unwrap();
    let config = fs::read(dir.path().join(".config")).unwrap();
    kdir::open(&matrix, matrix.kernel("stock").unwrap(), dir.path(), None).unwrap();
    assert_eq!(fs::read(dir.path().join(".config")).unwrap(), config);
    // Without its configuration the tree is refused, and zdvm removes nothing from it.
    fs::remove_file(dir.path().join(".config")).unwrap();
    refused(dir.path(), "has been built in place");
    let error = kdir::open(&matrix, matrix.kernel("stock").unwrap(), dir.path(), None).unwrap_err();
    assert!(!error.to_string().contains("mrproper"));
}

/// kbuild refuses `O=` beside such a tree, and advises what deletes the configuration.
#[test]
fn the_configuration_of_a_tree_in_place_is_for_a_copy() {
    let dir = built(&matrix());
    let file = Path::new("/cache/.config");
    let mut written = Configured { file: file.to_owned(), is_theirs: true, added: vec![] };
    let said = kdir::advice(&written, dir.path(), None);
    let copy =
        format!("cp -a --reflink=auto {} DIR && cp {} ", dir.path().display(), file.display());
    assert!(said.contains(&copy) && said.contains("--kdir DIR\n"), "{said}");
    assert!(!said.contains("objdir"), "{said}");
    let clean = TempDir::new().unwrap();
    let said = kdir::advice(&written, clean.path(), None);
    assert!(said.contains("mkdir -p DIR") && said.contains("--objdir DIR\n"), "{said}");
    let said = kdir::advice(&written, clean.path(), Some(dir.path()));
    assert!(said.contains(&copy) && said.contains("--objdir DIR\n"), "{said}");
    assert!(said.contains("lacked nothing"), "{said}");
    written.added.push("CONFIG_A=y".to_owned());
    let said = kdir::advice(&written, clean.path(), None);
    assert!(said.contains("with what it lacked: CONFIG_A=y."), "{said}");
    written.is_theirs = false;
    let said = kdir::advice(&written, clean.path(), None);
    assert!(said.contains("has no configuration"), "{said}");
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
