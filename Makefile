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

# The modules of these folders must not import each other in a cycle.
ACYCLIC := rust/audit rust/driver rust/kernel/mm rust/kernel qemu/src qemu/guest/src selftests/src

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
ifeq ($(filter-out undefined default,$(origin LLVM) $(origin CC)),)
compilers = $$(scripts/tree-compilers.sh "$$tree")
endif
# The kernel's make says less about a tree that cannot have this module.
kbuild = tree="$(build-tree)"; scripts/tree-check.sh "$$tree"; \
	$(ENV) make -C "$$tree" $(compilers) M="$(CURDIR)" $(if $(MO),MO="$(abspath $(MO))")

.PHONY: all modules modules_install clean distclean run test test-kernels test-host test-boot test-page test-repeat test-upstream \
	bench mutants patch-check in-tree shell kconfig help doctor \
	compile-fail rust-analyzer rustfmt rustfmtcheck clippy rustdoc htmldocs checkpatch unsafe-check cycles

all: modules

modules: $(need-tree)
	@$(kbuild) modules

modules_install: $(need-tree)
	@$(kbuild) modules_install

rust-analyzer: $(need-tree)
	@$(kbuild) rust-analyzer

# Everything in one command: tools, kernel source, patches, build, boot, quick tests, verdict.
run: $(ZDVM)
	@$(RUN) run $(or $(strip $(kdir-args)),--kernel patched)

# All tests: of the tools on this machine, and of the module on every kernel. A kernel that fails does
# not stop the others. The smoke suite runs the tests of the suite hmm once more in upstream's way, on
# one kernel. The kernels that clang builds get the quick run. With SHORT=1 all kernels but "debug" get
# the quick run, and the test of 1 GiB pages, which needs a machine of its own, runs.
test-kernels := --kernel patched --kernel stock --kernel clang $(if $(SHORT),,--kernel debug)
test: test-kernels test-host test-boot $(ZDVM)
ifneq ($(SHORT),)
	@status=0; \
	$(RUN) run --keep-going $(or $(strip $(kdir-args)),$(test-kernels)) || status=$$?; \
	$(RUN) run --full --machine pud --suite selftests --filter '^dax\.pud$$' \
		$(or $(strip $(kdir-args)),--kernel patched) || status=$$?; \
	exit $$status
else
	@status=0; \
	$(RUN) run --full --keep-going $(or $(strip $(kdir-args)),--kernel patched --kernel stock) \
		--suite kunit --suite selftests --suite hmm || status=$$?; \
	$(RUN) run --machine strict --suite kunit --suite selftests --suite hmm \
		$(or $(strip $(kdir-args)),--kernel patched) || status=$$?; \
	$(RUN) run --full $(or $(strip $(kdir-args)),--kernel patched) --suite smoke || status=$$?; \
	$(if $(KDIR),,$(RUN) run --keep-going --kernel debug --kernel clang || status=$$?;) \
	$(RUN) run --full --machine pud --suite selftests --filter '^dax\.pud$$' \
		$(or $(strip $(kdir-args)),--kernel patched) || status=$$?; \
	exit $$status
endif

# Builds the kernels at once, two at a time. One that fails is built again by the run that needs it,
# which says so in its verdict.
test-kernels: $(ZDVM)
ifeq ($(KDIR),)
	-@$(RUN) build $(test-kernels)
endif

test-host:
	@echo "  TEST    zdvm, zdm-selftests (on this machine)"
	@$(ENV) cargo test -q --workspace

# Draws the page of a run in a real browser, and compares it with stored pictures. PICTURES=write
# stores what was drawn.
test-page:
	@echo "  TEST    report.html (in a browser)"
	@scripts/toolchain.sh chromium
	@ZDM_PICTURES=$(PICTURES) $(ENV) cargo test -q -p zdvm --test html -- --ignored

# Boots guests that go wrong on purpose, and checks that the runner notices.
test-boot: $(ZDVM)
	@echo "  TEST    zdvm (in guests that fail)"
	@tree="$(build-tree)"; ZDVM_TEST_TREE="$$tree" \
		$(ENV) cargo test -q -p zdvm --test boot -- --ignored --test-threads=2

# Runs N times and continues after a failure; the last lines say how many runs were clean.
test-repeat: $(ZDVM)
	@$(RUN) run --full --keep-going --repeat $(or $(N),10) $(or $(strip $(kdir-args)),--kernel patched)

# Compares the kernel tree's own C driver and ours, test by test. WRITE=1 writes the table to the
# documentation.
test-upstream: $(ZDVM)
	@$(RUN) compare $(if $(WRITE),--write) $(or $(strip $(kdir-args)),--kernel stock)

# Measures the C driver against this one, and the cost of the oracle, as ratios of times that one guest
# measures side by side: once by the clock, once by instructions, which other work cannot disturb.
bench: $(ZDVM)
	@for accel in auto icount; do \
		$(RUN) run $(or $(strip $(kdir-args)),--kernel bench) --suite versus --accel $$accel; \
		$(RUN) run $(or $(strip $(kdir-args)),--kernel bench) --machine private --suite bench --accel $$accel; \
	done

# Measures how good the tests are, on a kernel with one bug at a time. MUTANTS="NAME..." selects bugs,
# WRITE=1 writes the table to the documentation. An interrupted run is resumed.
mutants: $(ZDVM)
	@$(RUN) mutants $(MUTANTS) $(if $(WRITE),--write)

# Checks the series patch by patch, and boots the result. The first run takes hours on two processors;
# an interrupted run is resumed, and stored results are printed at once.
patch-check: $(ZDVM)
	@scripts/toolchain.sh cross powerpc64le-linux-gnu
	@$(RUN) patch-check $(if $(KERNEL),--kernel $(KERNEL)) $(if $(NOBOOT),--no-boot)

# The abstractions as patches over the kernel, in build/in-tree. BUILD=1 also builds a kernel with
# them, BOOT=1 also boots it, which runs every example.
in-tree: $(ZDVM)
	@$(RUN) in-tree $(if $(BUILD),--build) $(if $(BOOT),--boot)

doctor:
	@$(RUN) doctor

shell: $(ZDVM)
	@$(RUN) shell $(kdir-args)

# Writes a configuration with the symbols that your tree's configuration lacks.
kconfig: $(ZDVM)
	@$(if $(KDIR),,$(error make kconfig wants KDIR=DIR, a kernel tree of yours))
	@$(RUN) kconfig $(dir-args)

$(ZDVM): $(ZDVM_SRC)
	@echo "  CARGO   $@"
	@$(ENV) cargo build $(if $(shell test -t 2 && echo terminal),,-q) -p zdvm
	@touch $@

rustfmt:
	@$(ENV) rustfmt --edition 2021 rust/zdmirror.rs $(wildcard samples/compile-fail/*.rs)
	@$(ENV) cargo fmt --all

rustfmtcheck:
	@echo "  RUSTFMT rust qemu selftests"
	@$(ENV) rustfmt --edition 2021 --check rust/zdmirror.rs $(wildcard samples/compile-fail/*.rs)
	@$(ENV) cargo fmt --all --check

# This is a separate build, because the objects of a plain one would hide the warnings.
clippy: $(need-tree)
	@echo "  CLIPPY  zdvm, zdm-selftests"
	@$(ENV) cargo clippy -q --workspace --all-targets -- -D warnings
	@rm -rf build/clippy && mkdir -p build/clippy
	@tree="$(build-tree)"; $(ENV) make -C "$$tree" $(compilers) M="$(CURDIR)" \
		MO="$(CURDIR)/build/clippy" CLIPPY=1 KRUSTFLAGS=-Dwarnings modules

# Checks that misuses of the abstractions do not compile, with one build of the crate for all of them.
compile-fail: $(need-tree)
	@echo "  COMPILE-FAIL samples/compile-fail"
	@mkdir -p build/compile-fail
	@tree="$(build-tree)"; $(ENV) make -C "$$tree" $(compilers) M="$(CURDIR)" \
		MO="$(CURDIR)/build/compile-fail" rust/zdmirror.o > build/compile-fail/build.log 2>&1 || \
		{ cat build/compile-fail/build.log; exit 1; }
	@$(ENV) scripts/compile-fail.sh build/compile-fail

rustdoc: $(need-tree)
	@mkdir -p build/rustdoc
	@$(ENV) make -C "$(build-tree)" M="$(CURDIR)" MO="$(CURDIR)/build/rustdoc" ZDM_RUSTDOC=y modules
	@echo "  DOC     build/rustdoc/doc/zdmirror/index.html"

# The documentation as web pages; a warning is an error.
htmldocs:
	@scripts/toolchain.sh sphinx
	@$(ENV) python3 -m sphinx -q -W --keep-going -n -d build/doctrees -b html Documentation build/htmldocs
	@echo "  DOC     build/htmldocs/index.html"

# Runs the tree's checkpatch.pl on the patches and on all C files. The commits that a message names
# cannot be looked up without the kernel's history.
checkpatch: $(need-tree)
	@echo "  CHECKPATCH"
	@for p in $$(find qemu/kernel/patches -name '*.patch'); do \
		$(ENV) perl "$(build-tree)/scripts/checkpatch.pl" --strict --quiet --no-tree \
			--ignore UNKNOWN_COMMIT_ID - < $$p; \
	done
	@for p in qemu/kernel/mutants/*.patch; do \
		$(ENV) perl "$(build-tree)/scripts/checkpatch.pl" --strict --quiet --no-tree \
			--ignore FILE_PATH_CHANGES - < $$p; \
	done
	@$(ENV) perl "$(build-tree)/scripts/checkpatch.pl" --strict --quiet --no-tree --file \
		--ignore CONST_STRUCT,VOLATILE $(wildcard rust/helpers/*.[ch] uapi/*.h)

# Checks that no modules import each other in a cycle.
cycles:
	@python3 scripts/module-cycles.py $(ACYCLIC)

# Checks that all unsafe code is in rust/kernel (and in the generated bindings).
unsafe-check:
	@scripts/unsafe-check.sh

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
	@echo '  test           - all tests, on the patched and on the stock kernel; SHORT=1 leaves out'
	@echo '                   what takes long'
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
	@echo '  htmldocs       - Documentation as web pages, with Sphinx'
	@echo '  rustdoc        - document all items, private ones too'
	@echo 'Checks:'
	@echo '  rustfmt, rustfmtcheck, clippy, checkpatch, unsafe-check, compile-fail, cycles, test-host,'
	@echo '  test-page (the page of a run in a browser)'
	@echo 'Looking around:'
	@echo '  shell          - boot to a shell with the module loaded'
	@echo '  kconfig        - KDIR=DIR: write your configuration and what is missing in it'
	@echo '  doctor         - what this machine lacks, and the command that installs it'
	@echo 'All of these are commands of ./zdvm, which has more options: ./zdvm --help'
