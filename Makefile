# SPDX-License-Identifier: GPL-2.0
#
# The targets that users type. Kbuild describes the module itself; qemu/ has the runner, zdvm.
#
#   KDIR=DIR   your own kernel tree, instead of the ones that zdvm builds
#   O=DIR      its build directory, if that is not KDIR itself
#   EXPECT=K   the kernel of the matrix whose results your tree gives (default: found out)
#   SOURCE=X   a source tree or tarball for the kernels that zdvm builds, instead of Debian's
#   MO=DIR     the directory of the module's build output (default: beside its source)

MAKEFLAGS += --no-print-directory
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

# Everything runs with the tool set of Debian 13, in a sysroot or on Debian itself.
ENV := scripts/toolchain.sh run
# The wrapper also builds the program.
RUN := ./zdvm

# The kernel's make gets these as arguments, not by the environment.
unexport KDIR O MO

CARGO_TARGET := target
# The profile is that of the tests, so that crates are compiled once.
ZDVM := $(CARGO_TARGET)/debug/zdvm
ZDVM_SRC := $(shell find qemu/src qemu/guest -name '*.rs' 2>/dev/null) \
	    $(wildcard Cargo.toml Cargo.lock qemu/Cargo.toml)

# A mistyped directory gives a sentence, not what a make without a Makefile says.
ifneq ($(KDIR),)
ifeq ($(wildcard $(KDIR)/Makefile),)
$(error KDIR=$(KDIR): no kernel source or build directory is there)
endif
ifneq ($(O),)
ifeq ($(wildcard $(O)/.),)
$(error O=$(O): no such directory)
endif
endif
endif

dir-args := $(if $(KDIR),--kdir "$(abspath $(KDIR))" $(if $(O),--objdir "$(abspath $(O))"))
kdir-args := $(dir-args) $(if $(KDIR),$(if $(EXPECT),--expect $(EXPECT)))
ifneq ($(SOURCE),)
export ZDM_SOURCE := $(abspath $(SOURCE))
endif

# The tree that the module is built against: the user's, or zdvm's patched kernel.
ifneq ($(KDIR),)
build-tree = $(abspath $(or $(O),$(KDIR)))
need-tree :=
else
build-tree = $$($(RUN) path --kernel patched)
need-tree := $(ZDVM)
endif
# The compilers that the tree was built with, unless the command line names others.
found-out = $(if $(filter-out undefined default,$(foreach name,$2,$(origin $(name)))),given,$1)
compilers = $(ENV) scripts/tree-compilers.sh "$$tree" $(call found-out,c,LLVM CC) $(call found-out,rust,RUSTC)
# The kernel's make says less about a tree that cannot have this module.
kbuild = tree="$(build-tree)"; scripts/tree-check.sh "$$tree"; compilers=$$($(compilers)); \
	$(ENV) make -C "$$tree" $$compilers M="$(CURDIR)" $(if $(MO),MO="$(abspath $(MO))")

.PHONY: all modules modules_install rust-analyzer clean distclean help run test bench test-repeat \
	test-upstream mutants patch-check in-tree doctor shell kconfig check rustfmt rustfmtcheck clippy \
	compile-fail checkpatch rustdoc htmldocs unsafe-check cycles test-host test-page test-boot

all: modules

modules: $(need-tree)
	@$(kbuild) modules

modules_install: $(need-tree)
	@$(kbuild) modules_install

rust-analyzer: $(need-tree)
	@$(kbuild) rust-analyzer

# Each of these is a command of zdvm, whose --help says more. Which kernels, machines and tests it takes is
# in qemu/kernel/matrix.toml.
run:
	@$(RUN) run $(or $(strip $(kdir-args)),--kernel patched)

test:
	@$(RUN) test $(if $(SHORT),--short) $(kdir-args)

bench:
	@$(RUN) bench $(kdir-args)

# Runs N times and continues after a failure; the last lines say how many runs were clean.
test-repeat:
	@$(RUN) run --full --keep-going --repeat $(or $(N),10) $(or $(strip $(kdir-args)),--kernel patched)

test-upstream:
	@$(RUN) compare $(if $(WRITE),--write) $(or $(strip $(kdir-args)),--kernel stock)

mutants:
	@$(RUN) mutants $(MUTANTS) $(if $(WRITE),--write)

patch-check:
	@$(RUN) patch-check $(if $(KERNEL),--kernel $(KERNEL)) $(if $(NOBOOT),--no-boot)

in-tree:
	@$(RUN) in-tree $(if $(BUILD),--build) $(if $(BOOT),--boot)

doctor:
	@$(RUN) doctor

shell:
	@$(RUN) shell $(kdir-args)

kconfig:
	@$(if $(KDIR),,$(error make kconfig wants KDIR=DIR, a kernel tree of yours))
	@$(RUN) kconfig $(dir-args)

check:
	@$(RUN) check $(dir-args)

rustfmtcheck:
	@$(RUN) check rustfmt
unsafe-check:
	@$(RUN) check unsafe
test-host:
	@$(RUN) check host
test-page:
	@$(RUN) check page $(if $(PICTURES),--write)
htmldocs:
	@$(RUN) check docs
rustfmt:
	@$(RUN) check rustfmt --write
cycles:
	@$(RUN) check cycles
test-boot:
	@$(RUN) check boot $(dir-args)
clippy compile-fail checkpatch rustdoc:
	@$(RUN) check $@ $(dir-args)

$(ZDVM): $(ZDVM_SRC)
	@echo "  CARGO   $@"
	@$(ENV) cargo build $(if $(shell test -t 2 && echo terminal),,-q) -p zdvm
	@touch $@

clean:
	@rm -rf build scripts/doctests
	@find . -path ./target -prune -o -path ./.git -prune -o \( -name '*.o' -o -name '*.ko' \
		-o -name '*.mod' -o -name '*.mod.c' -o -name '.*.cmd' -o -name '*.rmeta' \
		-o -name Module.symvers -o -name modules.order -o -name '.module-common.*' \
		-o -name bindings_generated.rs -o -name doctests_generated.rs -o -name rust-project.json \) -type f -exec rm -f {} +

distclean: clean
	@rm -rf target

help:
	@echo 'The two that do everything:'
	@echo '  run            - get tools and kernel, patch, build, boot, test, print the verdict;'
	@echo '                   without the slow tests'
	@echo '  test           - all tests, on all kernels of the campaign "full" (qemu/kernel/matrix.toml);'
	@echo '                   SHORT=1: the campaign "short", which leaves out what takes long'
	@echo '  test-repeat    - all tests N=10 times, on the patched kernel'
	@echo '  test-upstream  - hmm-tests with the C driver and with ours, side by side;'
	@echo '                   WRITE=1 writes Documentation/upstream.rst'
	@echo 'With KDIR=DIR (and O=DIR) they use your kernel tree, which is brought up to date first.'
	@echo '  bench          - the C driver against this one; what the oracle costs'
	@echo '  mutants        - boot a kernel with bugs seeded on purpose, one at a time, and see which'
	@echo '                   tests notice; MUTANTS="NAME..." for some, WRITE=1 writes'
	@echo '                   Documentation/mutants.rst. An hour or more the first time'
	@echo '  patch-check    - apply the patches one by one, compile what each touches, checkpatch;'
	@echo '                   boot the result. Too slow for "test". KERNEL=patched-7.2 for one'
	@echo '                   series, NOBOOT=1 without the boot'
	@echo '  in-tree        - write the abstractions as patches over the kernel; BUILD=1 builds a kernel'
	@echo '                   with them, BOOT=1 boots it'
	@echo
	@echo 'Module:'
	@echo '  modules        - build zdmirror.ko (the default)'
	@echo '  modules_install, clean, distclean'
	@echo '  rust-analyzer  - write rust-project.json'
	@echo 'Checks:'
	@echo '  check          - all of the following; ./zdvm check --list describes them'
	@echo '  rustfmtcheck, unsafe-check, cycles, test-host, clippy, compile-fail, checkpatch, rustdoc,'
	@echo '  htmldocs, test-page, test-boot'
	@echo '  rustfmt        - format all Rust code'
	@echo 'Looking around:'
	@echo '  shell          - boot to a shell with the module loaded'
	@echo '  kconfig        - KDIR=DIR: write your configuration and what is missing in it'
	@echo '  doctor         - what this machine lacks, and the command that installs it'
	@echo 'All but those of the module are commands of ./zdvm, which has more options: ./zdvm --help'
