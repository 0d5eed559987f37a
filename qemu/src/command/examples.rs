// SPDX-License-Identifier: GPL-2.0
//! Examples that `--help` shows below the options.

/// Examples of `zdvm --help`.
pub const ALL: &str = "\
Examples:
  ./zdvm doctor                          what this machine lacks, and the command that mends it
  ./zdvm run                             build, boot, test the patched kernel, print the verdict
  ./zdvm run --suite selftests --filter '^fork' --repeat 10
  ./zdvm test --short                    all tests, on the kernels that build soon
  ./zdvm check rustfmt clippy            checks of the sources
  ./zdvm run --kdir ~/src/linux          the same with a kernel tree of yours
  ./zdvm shell                           a shell in the guest, with the module loaded
  ./zdvm report build/runs/latest        a page to look at, of one run or of several side by side
  source <(./zdvm completions bash)      complete commands and options with the Tab key";

/// Examples of `zdvm run --help`.
pub const RUN: &str = "\
Examples:
  ./zdvm run --list                                   what would run, without a boot
  ./zdvm run --kernel patched --kernel stock --keep-going
  ./zdvm run --full --machine small --vcpus 4         also the slow tests, on another machine
  ./zdvm run --suite kunit --suite selftests --filter '^migrate\\.'
  ./zdvm run --kernel mutants --mutant fork_no_ref --filter '^fork\\.'

Exit status: 0 pass, 1 fail, 2 usage or environment.";

/// Examples of `zdvm bisect --help`.
pub const BISECT: &str = "\
Examples, in your kernel tree:
  git bisect start BAD GOOD
  git bisect run ~/zdmirror/zdvm bisect --suite selftests --filter '^fork\\.'
  git bisect run ~/zdmirror/zdvm bisect --filter '^thp' --unbootable bad

Exit status, as `git bisect run` reads it: 0 the commit is good; 1 it is bad, that is, one and the
same test failed in two boots; 125 it cannot be tested; 128 this machine or the command line is at
fault, and the bisection stops.";

/// Examples of `zdvm gdb --help`.
pub const GDB: &str = "\
Examples:
  ./zdvm gdb                             a shell here; gdb in another terminal, as it says
  ./zdvm gdb --break zdm_module_try_get --type 'zdvm-audit'
                                         type a command in the guest, stop at the function, print
                                         the stack; exit status 1 if the function is never reached";

/// Examples of `zdvm report --help`.
pub const REPORT: &str = "\
Examples:
  ./zdvm report build/runs/latest                     writes build/runs/latest/report.html
  ./zdvm report out/stock out/patched --out side.html both kernels on one page";

/// Examples of `zdvm reproduce --help`.
pub const REPRODUCE: &str = "\
Examples:
  ./zdvm reproduce                                    all cases, on stock and on patched
  ./zdvm reproduce --filter ksm                       the cases about KSM

Exit status: 0 if every case fails before and passes after, 1 if not, 2 usage or environment.";

/// Examples of `zdvm check --help`.
pub const CHECK: &str = "\
Examples:
  ./zdvm check --list                                 what there is
  ./zdvm check                                        all of it
  ./zdvm check rustfmt clippy compile-fail
  ./zdvm check rustfmt --write                        format the code

Exit status: 0 if all checks passed, 1 if not, 2 usage or environment.";
