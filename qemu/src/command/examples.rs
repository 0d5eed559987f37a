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

/// Examples of `zdvm test --help`.
pub const TEST: &str = "\
Examples:
  ./zdvm test --short                    an hour or two the first time, as it builds three kernels
  ./zdvm test                            all kernels and all tests; some hours
  ./zdvm test --short --kdir ~/src/linux only your own kernel tree";

/// Examples of `zdvm bench --help`.
pub const BENCH: &str = "\
Examples:
  ./zdvm bench                           on an idle machine: other work falsifies times by the clock
  ./zdvm run --suite versus --accel icount
                                         only the pairs with the C driver, counted in instructions,
                                         which other work on the machine does not change";

/// Examples of `zdvm compare --help`.
pub const COMPARE: &str = "\
Examples:
  ./zdvm compare                         on the patched kernel
  ./zdvm compare --kernel stock --write  also writes the table of Documentation/upstream.rst";

/// Examples of `zdvm patch-check --help`.
pub const PATCH_CHECK: &str = "\
Examples:
  ./zdvm patch-check --kernel patched --no-boot
  ./zdvm patch-check                     each series, then a boot of the kernel that has it";

/// Examples of `zdvm in-tree --help`.
pub const IN_TREE: &str = "\
Examples:
  ./zdvm in-tree                         writes build/in-tree/*.patch and checks each patch
  ./zdvm in-tree --boot                  builds a kernel with them and runs every example";

/// Examples of `zdvm mutants --help`.
pub const MUTANTS: &str = "\
Examples:
  ./zdvm mutants --list                  the seeded bugs
  ./zdvm mutants fork_no_ref             boot one bug, once with each set of tests
  ./zdvm mutants fork_no_ref --detector suite --filter '^fork\\.'
  ./zdvm mutants --write                 all that have no result yet, then the table; hours";

/// Examples of `zdvm build --help`.
pub const BUILD: &str = "\
Examples:
  ./zdvm build                           the kernel patched
  ./zdvm build --kernel stock --kernel clang";

/// Examples of `zdvm path --help`.
pub const PATH: &str = "\
Examples:
  make KDIR=\"$(./zdvm path)\"            build the module for the patched kernel
  cp -a \"$(./zdvm path --kernel mutants)\" ~/mutants";

/// Examples of `zdvm kconfig --help`.
pub const KCONFIG: &str = "\
Examples:
  ./zdvm kconfig --kdir ~/src/linux      prints where it wrote the configuration, and how to use it";

/// Examples of `zdvm shell --help`.
pub const SHELL: &str = "\
Examples:
  ./zdvm shell                           `exit` or `poweroff` ends it; Ctrl-A X kills QEMU
  ./zdvm shell --kdir ~/src/linux        with a kernel of yours
  ./zdvm shell --machine strict          with strict=1 for the module";

/// Examples of `zdvm completions --help`.
pub const COMPLETIONS: &str = "\
Examples:
  source <(./zdvm completions bash)      for this shell
  ./zdvm completions zsh > ~/.zfunc/_zdvm
  ./zdvm completions fish > ~/.config/fish/completions/zdvm.fish";
