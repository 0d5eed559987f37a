// SPDX-License-Identifier: GPL-2.0
//! Several kernels, two builds at a time: a build has long parts that use one processor, such as
//! bindgen, the crates of Rust and the links of vmlinux.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use anyhow::Result;

use crate::job;
use crate::kernel::{self, Recipe, Tree};
use crate::plan::matrix::Matrix;

/// The number of builds that run at the same time.
const LANES: usize = 2;

/// Builds kernels by name. A kernel that cannot be built gives its error, which is printed at once,
/// because the others go on.
pub fn build_all(
    repo: &Path,
    matrix: &Matrix,
    names: &[String],
) -> Result<BTreeMap<String, Result<Tree>>> {
    let mut kernels = Vec::new();
    for name in names {
        let recipe = Recipe::new(repo, matrix, matrix.kernel(name)?)?;
        kernels.push((recipe.key(0), recipe.patches.len(), name.clone()));
    }
    let built = Mutex::new(BTreeMap::new());
    let queue = Mutex::new(rows(kernels));
    std::thread::scope(|scope| {
        for _ in 0..LANES {
            scope.spawn(|| {
                while let Some(row) = take(&queue) {
                    for name in row {
                        let tree = job::check_signals()
                            .and_then(|()| kernel::build(repo, matrix, &name))
                            .inspect_err(|e| eprintln!("zdvm: kernel {name}: {e:#}"));
                        built.lock().unwrap_or_else(PoisonError::into_inner).insert(name, tree);
                    }
                }
            });
        }
    });
    job::check_signals()?;
    Ok(built.into_inner().unwrap_or_else(PoisonError::into_inner))
}

fn take<T>(queue: &Mutex<VecDeque<T>>) -> Option<T> {
    queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
}

/// Kernels of one source and configuration, as (key without patches, number of patches, name), must
/// be built one after the other: those with more patches begin with a copy of those with fewer. Returns
/// these rows in the order in which the kernels are given.
fn rows(kernels: Vec<(String, usize, String)>) -> VecDeque<Vec<String>> {
    let mut rows: Vec<(String, Vec<(usize, String)>)> = Vec::new();
    for (key, patches, name) in kernels {
        match rows.iter_mut().find(|(of, _)| *of == key) {
            Some((_, row)) => row.push((patches, name)),
            None => rows.push((key, vec![(patches, name)])),
        }
    }
    let sorted = |mut row: Vec<(usize, String)>| {
        row.sort();
        row.dedup();
        row.into_iter().map(|(_, name)| name).collect()
    };
    rows.into_iter().map(|(_, row)| sorted(row)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_shares_a_configuration_is_built_in_a_row() {
        let kernel = |key: &str, patches, name: &str| (key.to_owned(), patches, name.to_owned());
        let rows = rows(vec![
            kernel("base", 113, "patched"),
            kernel("clang", 113, "clang"),
            kernel("base", 0, "stock"),
            kernel("debug", 113, "debug"),
            kernel("base", 113, "patched"),
        ]);
        assert_eq!(rows, [vec!["stock", "patched"], vec!["clang"], vec!["debug"]]);
    }
}
