import pytest

from mm_cb.core.errors import UserError
from mm_cb.core.pages import PAGE
from mm_cb.demo import run_demo
from mm_cb.demo_agents import run_agents
from mm_cb.real.run import run_real

COMMANDS = {
    "demo": lambda out: run_demo(out, full=False, seed=0, rr_seeds=1),
    "demo --agents": lambda out: run_agents(out, full=False, seed=0),
    "demo --real": lambda out: run_real(out, seed=0),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_experiment_begins_where_its_page_would_overwrite_somebody_elses(tmp_path, name):
    (tmp_path / PAGE).write_text("mine")
    (tmp_path / "data-quick-0").mkdir()  # what `demo --agents` takes for its own folder
    with pytest.raises(UserError, match="is no report page and is left alone"):
        COMMANDS[name](tmp_path)
