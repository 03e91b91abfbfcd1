"""The checkpoint: small, loadable by the usual classes, with a chat template that renders as documented."""

import json
import random
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("langgraph")
pytest.importorskip("langchain_openai")

from examples.text_to_sql import agent, demonstrations, make_model, questions  # noqa: E402  # after importorskip

FOLDER = Path(make_model.__file__).parent / "model"
CALL = {"id": "1", "type": "function", "function": {"name": "run", "arguments": '{"sql": "SELECT 1"}'}}


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    return transformers.AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


def test_the_checkpoint_stays_small_and_safe() -> None:
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    weights = [file.suffix for file in files if file.suffix in (".bin", ".pt", ".pkl", ".safetensors")]

    assert sum(file.stat().st_size for file in files) <= 8 * 2**20
    assert weights == [".safetensors"]


def test_it_is_a_qwen3_of_at_most_two_million_parameters_with_untied_embeddings(
    model: transformers.PreTrainedModel,
) -> None:
    assert model.config.model_type == "qwen3"
    assert model.num_parameters() <= 2_000_000
    assert model.get_input_embeddings().weight.data_ptr() != model.get_output_embeddings().weight.data_ptr()
    assert not torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)


def test_every_output_of_the_model_is_a_token(
    model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_peft_wraps_it(model: transformers.PreTrainedModel) -> None:
    peft = pytest.importorskip("peft")
    fresh = transformers.AutoModelForCausalLM.from_config(model.config)

    wrapped = peft.get_peft_model(fresh, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))

    trainable, everything = wrapped.get_nb_trainable_parameters()
    assert 0 < trainable < everything


def test_the_chat_template_renders_roles_as_single_tokens(
    tokenizer: transformers.PreTrainedTokenizerFast,
) -> None:
    messages = [
        {"role": "system", "content": "writer"},
        {"role": "user", "content": [{"type": "text", "text": "How many?"}]},
        {"role": "assistant", "content": "SELECT 1"},
    ]

    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    assert text == ("<|system|>writer<|end|><|user|>How many?<|end|><|assistant|>SELECT 1<|end|><|assistant|>")
    for token in make_model.SPECIAL_TOKENS:
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1


@pytest.mark.parametrize("arguments", ['{"sql": "SELECT 1"}', {"sql": "SELECT 1"}])
def test_the_chat_template_renders_tools_calls_and_tool_results(
    tokenizer: transformers.PreTrainedTokenizerFast, arguments: object
) -> None:
    call = CALL | {"function": {"name": "run", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "Go"},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
    ]

    text = tokenizer.apply_chat_template(messages, tools=[{"type": "function"}], tokenize=False)

    rendered = '<|call|>run {"sql": "SELECT 1"}'
    assert text == (
        f"<|tools|>{json.dumps({'type': 'function'})}<|end|>"
        f"<|user|>Go<|end|><|assistant|>{rendered}{rendered}<|end|><|tool|>3<|end|>"
    )


def test_demonstrations_are_tokenized_as_the_chat_template_would(
    tokenizer: transformers.PreTrainedTokenizerFast,
) -> None:
    rng = random.Random(0)
    for demonstration in [demonstrations.demonstrate(rng) for _ in range(100)]:
        example = make_model.encode(tokenizer, demonstration)
        answer = {"role": "assistant", "content": demonstration.answer}

        prompt = tokenizer.apply_chat_template(demonstration.messages, add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template([*demonstration.messages, answer], return_dict=False)

        assert prompt == example.prompt
        assert whole == example.prompt + example.answer


def test_every_answer_fits_the_agent_s_token_limit(tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    for question in questions.load("train", count=500):
        assert len(tokenizer.encode(question.sql)) < agent.MAX_TOKENS


def test_the_model_writes_sql_for_a_training_question(
    model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
    demonstration = demonstrations.demonstrate_writer(questions.load("train", count=1)[0], random.Random(0))
    example = make_model.encode(tokenizer, demonstration)

    ids = model.generate(torch.tensor([example.prompt]), max_new_tokens=48, do_sample=False)[0]

    answer = tokenizer.decode(ids[len(example.prompt) :], skip_special_tokens=True)
    assert answer.startswith("SELECT ")
    assert ids[-1] == tokenizer.eos_token_id
