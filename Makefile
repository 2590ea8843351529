.PHONY: check test demo
check:
	bash .ci/run
test:
	bash scripts/test.sh
demo:
	bash scripts/demo.sh
