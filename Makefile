# The tasks of users and developers in a clone of Nexus; `make help` lists them.

CARGO ?= cargo
PREFIX ?= /usr/local
DESTDIR ?=
# The directory of `make demo` and `make run`; a second run reuses its kernel and images.
DEMO_DIR ?= $(CURDIR)/target/demo
RUN_DIR ?= $(CURDIR)/target/run

# Finds the Rust that `make setup` installs, even in a shell that was started before.
export PATH := $(or $(CARGO_HOME),$(HOME)/.cargo)/bin:$(PATH):/usr/sbin:/sbin

TARGET := $(or $(CARGO_TARGET_DIR),$(CURDIR)/target)
# Where systemd looks for units, also below ~/.local.
SYSTEM_UNITS := $(DESTDIR)$(PREFIX)/lib/systemd/system
USER_UNITS := $(DESTDIR)$(PREFIX)/share/systemd/user
MAN := $(DESTDIR)$(PREFIX)/share/man

.DEFAULT_GOAL := build
.PHONY: setup setup-test setup-arm64 setup-harnesses setup-fuzz setup-bench setup-docs setup-dist docs build release lint doc test stress e2e kernel e2e-kernel e2e-boots e2e-checkpoints e2e-docker e2e-systemd e2e-selfhost e2e-arm64 e2e-harnesses fuzz demo run bench audit install uninstall mcpb dist dist-test dist-twice deb deb-test arch arch-test upgrade-test checklist clean help

setup: ## install whatever is missing: system packages (as root or by sudo), Rust
	@.ci/setup

setup-test: ## install what the tests need besides
	@.ci/setup test

setup-harnesses: ## install what the harnesses of examples/harnesses need
	@.ci/setup harnesses

setup-arm64: ## install what emulating another architecture needs: its QEMU, and Rust's library for it
	@.ci/setup arm64

setup-fuzz: ## install what building needs, and the fuzzer
	@.ci/setup fuzz

setup-bench: ## install what the benchmarks compare with
	@.ci/setup bench

setup-docs: ## install what the book needs: mdBook, compiled once, some minutes
	@.ci/setup docs

docs: setup-docs ## make the book in target/book, searchable without a network, and check its links
	@.ci/docs

setup-dist: ## install what making and trying packages needs
	@.ci/setup dist

build: ## build everything for development, the guest included
	$(CARGO) build --locked --workspace --exclude nexus-guest

release: ## an optimised build: what install and run use
	$(CARGO) build --locked --release -p nexus-host -p nexus-net

lint: ## formatting, clippy and the rules of the architecture
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	$(CARGO) test --locked --workspace --test tidy

# Every public item has a comment by a lint of the compiler; this finds links in comments that lead nowhere. Those to private items
# lead somewhere, for these are documented as well.
doc: ## make the documentation of the code in target/doc; a warning is an error
	RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" $(CARGO) doc --locked --workspace --no-deps --document-private-items

test: setup-test ## every test, those with real virtual machines included
	@.ci/test

e2e: setup-test ## only the tests with real virtual machines
	@.ci/test e2e

# COUNT=N runs each N times.
stress: setup-test ## run the quick tests ten times, to find those that fail now and then
	@.ci/test stress

# KERNEL=NAME is the name of the asset. Not part of `make test`.
kernel: setup ## build the fast microVM kernel from the distribution's source by nexusctl, ten processor minutes, and import it
	@.ci/kernel
	@.ci/kernel import $(KERNEL)

e2e-kernel: setup-test ## boot the microVM kernel (built if it is not there) next to the distribution's, and compile one in a virtual machine
	@.ci/kernel
	@.ci/test microvm_kernel

e2e-boots: setup-test ## boot a virtual machine 50 times while its emulator is stopped again and again; some ten minutes
	@.ci/test boots

e2e-checkpoints: setup-test ## take a hundred checkpoints of a busy virtual machine, pause it a thousand times, fork ten that draw random numbers; half an hour
	@.ci/test checkpoints

e2e-docker: setup-test ## run a container in a virtual machine; makes an image with docker.io first, some minutes
	@.ci/test docker

e2e-systemd: setup-test deb ## install the Debian package in a virtual machine with systemd, and restart and kill its service; makes the package first
	@.ci/test systemd

e2e-selfhost: setup-test ## build and test Nexus in a virtual machine, and boot another one with the guest built there; slow without KVM
	@.ci/test selfhost

e2e-arm64: setup-test setup-arm64 ## boot a Debian of arm64 in an emulated virtual machine; builds a guest for it first (on aarch64: of x86_64)
	@.ci/test arm64

# Not part of `make test`, because it downloads 200 MB of Python packages the first time.
e2e-harnesses: setup-harnesses ## run Inspect, Harbor and the OpenAI Agents SDK with VMs as their sandboxes, by their own checks
	@.ci/test harnesses

# Not part of `make test`, because its inputs are random.
fuzz: setup-fuzz ## fuzz what reads from guests, clients and models, each for a minute
	@.ci/fuzz

demo: setup ## installs what is missing, builds, and creates, uses and deletes a first virtual machine over MCP
	$(CARGO) build --locked --release -p nexus-host -p nexus-examples --bins
	@$(TARGET)/release/demo $(TARGET)/release/nexusd $(DEMO_DIR)

run: release ## run a daemon in the foreground, with state of its own under target/run
	@echo "from another shell: NEXUS_RUNTIME_DIR=$(RUN_DIR)/run $(TARGET)/release/nexusctl status"
	NEXUS_STATE_DIR=$(RUN_DIR)/state NEXUS_RUNTIME_DIR=$(RUN_DIR)/run $(TARGET)/release/nexusd

# BENCH="boot --runs 30" runs only that measurement; `target/release/bench --help` lists the options.
bench: setup-bench ## measure; prints the tables of docs/benchmarks.md
	$(CARGO) build --locked --release -p nexus-host -p nexus-net -p nexus-tests --bins
	@$(TARGET)/release/bench $(BENCH)

audit: ## check licences, sources and known vulnerabilities of the dependencies, by cargo-deny
	@.ci/audit

# Compiles nothing under sudo: root may have no Rust, and would leave files of root in target/.
install: $(if $(SUDO_USER),,release) ## copy binaries, systemd units and manual pages to PREFIX (/usr/local)
	@[ -x $(TARGET)/release/nexusd ] || { echo "first, without sudo: make release"; exit 1; }
	install -d $(DESTDIR)$(PREFIX)/bin $(SYSTEM_UNITS) $(USER_UNITS) $(MAN)/man1 $(MAN)/man8
	install -m 0755 $(TARGET)/release/nexusd $(TARGET)/release/nexusctl $(TARGET)/release/nexus-net $(DESTDIR)$(PREFIX)/bin/
	sed 's#/usr/local/bin/#$(PREFIX)/bin/#' host-mcp/systemd/nexus.service > $(SYSTEM_UNITS)/nexus.service
	sed 's#/usr/local/bin/#$(PREFIX)/bin/#' host-mcp/systemd/user/nexus.service > $(USER_UNITS)/nexus.service
	chmod 0644 $(SYSTEM_UNITS)/nexus.service $(USER_UNITS)/nexus.service
	$(TARGET)/release/nexusctl man $(MAN)/man1
	$(TARGET)/release/nexusd man $(MAN)/man8
	install -m 0644 net/nexus-net.8 $(MAN)/man8/
	@echo "next: systemctl daemon-reload && systemctl enable --now nexus"
	@echo "or for your user alone: systemctl --user daemon-reload && systemctl --user enable --now nexus"

# URL=https://... also writes the server.json for the MCP registry, with the bundle at that address.
mcpb: dist ## make a bundle of the static nexusctl and nexusd for clients that install MCPB files, in target/dist
	@.ci/mcpb $(TARGET)/dist/bin $(TARGET)/dist $(URL)
	@.ci/dist sums >/dev/null

# SIGN_KEY=ID signs the checksums. The others take what this made.
dist: setup-dist ## make the tarball of a release in target/dist: static nexusd and nexusctl, with licences and checksums
	@.ci/dist

dist-test: ## run the static programs in an empty root; needs root
	@.ci/dist-test

# Not part of `make test`, because it compiles everything twice.
dist-twice: setup-dist ## make the tarball from two clones in two folders and compare the bytes
	@.ci/dist-twice

deb: dist ## make Debian packages of it: nexus and nexus-net
	@.ci/deb

deb-test: ## install, upgrade, remove and purge the packages in a fresh Debian 12 root; needs root, some minutes
	@.ci/deb-test

arch: dist ## make Arch packages of it, by makepkg
	@.ci/arch

arch-test: ## the same, then install and remove them by pacman in a root of their own; needs root
	@.ci/arch test

# OLD=DIR has nexusd and nexusctl of the version before, NEW=DIR those of this one.
upgrade-test: ## start a VM with the daemon in OLD, and have the one in NEW take it up
	@.ci/upgrade-test $(OLD) $(or $(NEW),$(TARGET)/dist/bin)

checklist: ## say whether this tree is ready to be released, and what is left to do; runs and makes nothing
	@.ci/release --dry-run

uninstall: ## remove what install put there; virtual machines and state stay
	rm -f $(DESTDIR)$(PREFIX)/bin/nexusd $(DESTDIR)$(PREFIX)/bin/nexusctl $(DESTDIR)$(PREFIX)/bin/nexus-net
	rm -f $(SYSTEM_UNITS)/nexus.service $(USER_UNITS)/nexus.service
	rm -f $(MAN)/man1/nexusctl.1 $(MAN)/man1/nexusctl-*.1 $(MAN)/man8/nexusd.8 $(MAN)/man8/nexusd-*.8 $(MAN)/man8/nexus-net.8

clean: ## remove everything that was built, and the state of demo and run
	$(CARGO) clean
	rm -rf $(DEMO_DIR) $(RUN_DIR)

help: ## this list
	@awk -F ':[^#]*## ' '/^[a-z0-9-]+:[^#]*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
