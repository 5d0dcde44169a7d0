# memsync: the two commands are `make bench` and `make test`.
SHELL := /bin/bash
GO ?= go
LAB ?= 1
RUNS ?= 6
OUT ?= results/out/bench
ALL ?= results/out/all
FUZZTIME ?= 30s
ROUNDS ?= 6
PKG ?= ./...
FIGURES := latency-first-chunk-rttvar-1 throughput-rttvar-1
# The commit for manifests; empty outside a checkout of git.
STAMP = $(shell h=$$(git rev-parse HEAD 2>/dev/null) && echo "$$h$$(test -z "$$(git status --porcelain)" || echo +dirty)")
LDFLAGS = -ldflags "-X memsync/results.stamp=$(STAMP)"
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2

.PHONY: bench bench-all paper bench-nbd bench-lab test build race lint fmt fuzz clean help peers peers-test

bench: build ## the main job: two figures, quick form, on a real shaped link (minutes)
	bin/memsync doctor
	bin/memsync run $(FIGURES) --quick --runs $(RUNS) --out $(OUT)

bench-all: build ## every figure in both variants, and a report: hours; QUICK=1 is the quick form; goes on where it was stopped
	bin/memsync doctor
	bin/memsync run --all $(if $(QUICK),--quick,--variant both) --out $(ALL)
	bin/memsync report $(ALL)

paper: build ## a paper (PDF) of the result folder DIR: DIR/paper/paper.pdf; without LaTeX it names Debian's packages
	bin/memsync paper $(if $(DIR),$(DIR),$(ALL))

# One package at a time: tests that measure time must not compete with others.
test: build ## all tests (PKG=./netem for one package)
	@echo "fetches: Go modules that are not in the module cache yet; for LAB=1 also, once, Debian's user-mode-linux (into the user cache)"
	LAB=$(LAB) $(GO) test -p 1 -count=1 -timeout 20m $(PKG)
	@if [ "$(LAB)" = 0 ]; then echo "left out: the tests in the lab kernel (LAB=0)"; fi

build: ## bin/memsync
	@echo "fetches: Go modules that are not in the module cache yet"
	CGO_ENABLED=0 $(GO) build -trimpath $(LDFLAGS) -o bin/memsync ./cmd/memsync

# The lab's own tests look at times, which the race detector stretches; those in it are raced.
# Two packages at a time: nothing is measured here.
race: ## all tests under the race detector (needs gcc), those of the kernel's NBD device in the lab kernel
	@st=0; set -x; LAB=0 $(GO) test -p 2 -race -count=1 -timeout 20m $(PKG) || st=1; { set +x; } 2>/dev/null; \
	case "$(LAB) $(PKG)" in 0*) echo "left out: the kernel's NBD device in the lab kernel (LAB=0)";; \
	"1 ./..."|*scenarios/lab*) LAB=1 $(GO) test -race -count=1 -timeout 20m -run '^TestKernelPackages$$' ./scenarios/lab || st=1;; esac; exit $$st

lint: ## formatting, vet, staticcheck; the layer rules are a test (scenarios/layers_test.go)
	@test -z "$$(gofmt -l .)" || { echo "gofmt would change:"; gofmt -l .; exit 1; }
	$(GO) vet ./...
	$(GO) run $(STATICCHECK) ./...

peers: ## bin/memsync-peers: memsync with other projects' programs as strategies (needs gcc; docs/peers.md)
	@echo "fetches: Go modules that are not in the module cache yet"
	cd strategies/peers && CGO_ENABLED=1 $(GO) build -trimpath $(LDFLAGS) -o ../../bin/memsync-peers ./cmd/memsync-peers

peers-test: build peers ## vet, staticcheck and tests of the peers' module (needs gcc)
	cd strategies/peers && $(GO) vet ./... && $(GO) run $(STATICCHECK) ./...
	cd strategies/peers && LAB=$(LAB) $(GO) test -p 1 -count=1 -timeout 20m $(PKG)

fuzz: ## every fuzz target in turn, each for FUZZTIME (a release: FUZZTIME=10m); PKG=./strategies/transport/nbd for one package
	@set -e; for p in $$($(GO) list $(PKG)); do \
		for f in $$($(GO) test -list '^Fuzz' $$p | grep '^Fuzz' || true); do \
			echo "$$p $$f"; $(GO) test -run '^$$' -fuzz "^$$f$$" -fuzztime $(FUZZTIME) $$p; \
		done; \
	done

bench-nbd: ## our NBD server and client beside nbdkit's and nbdcopy, in turn, and the ratios of docs/nbd-interop.md
	MEMSYNC_MUST_RUN=nbd-interop $(GO) test -run '^$$' -bench '^BenchmarkInterop$$' -benchtime 10x ./strategies/transport/nbd

bench-lab: peers ## the lab kernel and NBD devices in it, with the ratio to nbdkit's, as in docs/bars.md: medians of ROUNDS=6
	$(GO) test -run '^$$' -bench '^BenchmarkLab$$' -benchtime $(ROUNDS)x -timeout 30m ./scenarios/lab

fmt: ## gofmt -w
	gofmt -w .

clean: ## what was built; results stay
	rm -rf bin

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'
