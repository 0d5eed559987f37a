// SPDX-License-Identifier: GPL-2.0
//! The commands of the program.

pub mod bisect;
pub mod campaign;
pub mod check;
pub mod compare;
pub mod doctor;
pub mod examples;
pub mod gdb;
pub mod in_tree;
pub mod mutants;
pub mod patchcheck;
pub mod reproduce;
pub mod run;
pub mod runs;
pub mod select;
