// SPDX-License-Identifier: GPL-2.0

//! mbind(2) of pages on a device: they are on no list of the LRU and belong to no node that a policy
//! could want them on. So they stay where they are, and no call fails because of them, strict or not,
//! small or huge.

use super::chain::{SIZES, filled};
use super::leak::settled;
use super::{Ctx, Test};
use crate::check::{Fail, OrFail, Outcome};
use crate::device::check_bytes;
use crate::{check_eq, numa, proc};

pub const TESTS: &[Test] = of_each_kind!("nodes": "bind" => bind);

fn bind(ctx: &Ctx, node: usize) -> Outcome {
    let nodes = numa::nodes()?;
    if nodes < 2 {
        return Err(Fail::Skip("there is one node".into()));
    }
    for huge in SIZES {
        settled(ctx, node, |target| {
            let buf = filled(huge, 1950)?;
            let n = buf.pages();
            target.move_all(&buf, 1950)?;
            let before = proc::on_device(&buf, 0, n)?;
            for to in 0..nodes {
                for strict in [false, true] {
                    numa::bind(&buf, 0, n, to, strict)
                        .or_fail(&format!("mbind to node {to}, huge {huge}, strict {strict}"))?;
                    target.expect(&buf, 0, n, n)?;
                    check_eq!(
                        proc::on_device(&buf, 0, n)?,
                        before,
                        "frames after mbind to node {to}"
                    );
                }
            }
            let read = target.read(&buf, 0, n).or_fail("READ")?;
            check_bytes(&read.data, 1950, 0, "READ after mbind")?;
            target.bring_back(&buf, 0, n)?;
            buf.check(0, n, 1950)
        })?;
    }
    Ok(())
}
