// SPDX-License-Identifier: GPL-2.0
//! Campaigns: what `zdvm test` and `zdvm bench` run, one boot or several after the other.

use serde::Deserialize;

use crate::plan::expected::Pattern;

/// One run of a campaign, with the options of `zdvm run`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CampaignRun {
    /// The kernels.
    pub kernels: Vec<String>,
    /// The machine.
    #[serde(default = "default_name")]
    pub machine: String,
    /// The suites; by default those of a run that names none.
    #[serde(default)]
    pub suites: Vec<String>,
    /// Only tests whose name matches this regular expression.
    #[serde(default)]
    pub filter: Option<Pattern>,
    /// Whether the slow tests run, too.
    #[serde(default)]
    pub full: bool,
    /// `auto`, `kvm`, `tcg` or `icount`.
    #[serde(default = "auto")]
    pub accel: String,
    /// Whether the run is about the kernels of the matrix, and is left out for a user's own tree.
    #[serde(default)]
    pub matrix_only: bool,
}

fn default_name() -> String {
    "default".to_owned()
}

fn auto() -> String {
    "auto".to_owned()
}
