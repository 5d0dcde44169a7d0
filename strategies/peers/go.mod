module memsync/strategies/peers

go 1.26.0

replace memsync => ../..

require (
	github.com/loopholelabs/userfaultfd-go v0.1.2
	github.com/pojntfx/go-nbd v0.3.2
	memsync v0.0.0
)
