"""An evaluation with a model of ours: the sandbox is found by its name, files and tools work."""

import json

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import ModelOutput, ModelUsage, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import bash, python

CALLS = [
    ("bash", {"command": "cat data/number && cat from-setup && echo $(id -un) $FROM_CONFIG $PWD"}),
    ("python", {"code": "print(6 * 7)"}),
    ("bash", {"command": "echo before; sleep 60"}),
]


def outputs():
    made = [ModelOutput.for_tool_call("mockllm/model", *call) for call in CALLS]
    made.append(ModelOutput.from_content("mockllm/model", "the answer is 42"))
    for output in made:
        output.usage = ModelUsage()  # otherwise tokens are counted with a file from the network
    return made


def test_an_evaluation_runs_in_a_vm(tmp_path):
    config = tmp_path / "nexus.toml"
    config.write_text('memory = "512MiB"\nworkdir = "/srv/task"\nenv = { FROM_CONFIG = "yes" }\n')
    sample = Sample(
        input="What is the number?",
        target="42",
        files={"data/number": "forty-two\n"},
        setup="#!/bin/sh\necho set up > from-setup\n",
    )
    task = Task(
        dataset=[sample],
        solver=[use_tools(bash(timeout=5), python(timeout=60)), generate()],
        scorer=includes(),
        sandbox=("nexus", str(config)),
    )
    model = get_model("mockllm/model", custom_outputs=outputs())
    [log] = eval(task, model=model, display="none", log_dir=str(tmp_path))
    assert log.status == "success", log.error
    [sample] = log.samples
    answers = [message for message in sample.messages if message.role == "tool"]
    assert answers[0].text == "forty-two\nset up\nroot yes /srv/task\n", answers[0]
    assert answers[1].text == "42\n", answers[1]
    assert answers[2].error.type == "timeout", answers[2]
    assert sample.scores["includes"].value == "C", json.dumps(sample.scores, default=str)
