"""Register what comes with Leyden. Components are named here, never imported."""

from leyden.hookspecs import Registry, hookimpl, lazy

leyden_api_version = 1


FRAMEWORKS = (
    ("langchain", "langchain:LangChainAdapter", "LangChain and LangGraph"),
    ("openai-agents", "openai_agents:OpenAIAgentsAdapter", "OpenAI Agents SDK"),
    ("autogen", "autogen:AutoGenAdapter", "AutoGen AgentChat"),
    ("crewai", "crewai:CrewAIAdapter", "CrewAI"),
    ("agent-framework", "agent_framework:AgentFrameworkAdapter", "Microsoft Agent Framework"),
    ("agentscope", "agentscope:AgentScopeAdapter", "AgentScope"),
)
"""Name, adapter, summary. Plain `openai` needs no adapter: the wire hears it."""


DIALECTS = (
    ("chat", "chat:ChatDialect", "OpenAI chat completions"),
    ("completions", "completions:CompletionsDialect", "OpenAI completions"),
    ("responses", "responses:ResponsesDialect", "OpenAI Responses"),
    ("messages", "messages:MessagesDialect", "Anthropic messages"),
)
"""Name, dialect, summary."""


TRACKERS = (
    ("tensorboard", "tensorboard:TensorBoardSink", "curves for TensorBoard, in the run's folder"),
    ("trackio", "trackio:TrackioSink", "curves for Trackio's local dashboard"),
    ("wandb", "wandb:WandbSink", "curves for Weights & Biases, online or offline"),
)
"""Name, sink, summary."""


RL_ALGORITHMS = (
    ("reinforce", "Reinforce", "policy gradient with a baseline"),
    ("rloo", "RLOO", "policy gradient with the mean of the others as baseline"),
    ("grpo", "GRPO", "group-relative policy optimisation"),
    ("dr-grpo", "DrGRPO", "GRPO without its biases of std and length"),
    ("reinforce-plus-plus", "ReinforcePlusPlus", "advantages scaled over the whole step"),
    ("ppo", "PPO", "GAE with a value head"),
    ("hierarchical-grpo", "HierarchicalGRPO", "GRPO in groups of task, role and turn"),
    ("lightning-rl", "LightningRL", "credit for calls, then an algorithm for single calls"),
    ("dapo", "DAPO", "GRPO with clip-higher and dynamic sampling"),
    ("gspo", "GSPO", "GRPO with one ratio a call"),
    ("cispo", "CISPO", "GRPO with a clipped weight in place of a clipped gain"),
)
"""Name, class, summary."""

OTHER_ALGORITHMS = (
    ("rejection-sampling", "sft:RejectionSampling", "fine-tuning on the best rollouts"),
    ("distillation", "sft:Distillation", "fine-tuning on what a stronger policy or the app's own model says"),
    ("fine-tuning", "sft:FineTuning", "fine-tuning on stored rollouts"),
    ("dpo", "preference:DPO", "direct preference optimisation on pairs of rollouts"),
    ("simpo", "preference:SimPO", "preference optimisation without a reference"),
)
"""Name, class, summary."""


PROMPT_ALGORITHMS = (
    ("gepa", "GEPA", "reflective prompt evolution"),
    ("beam-search", "BeamSearch", "prompts along textual gradients, as APO"),
)
"""Name, class, summary."""


@hookimpl
def leyden_register(registry: Registry) -> None:
    """Name every built-in component; adding one is adding a line."""
    for name, path, summary in FRAMEWORKS:
        registry.framework(name, lazy(f"leyden_plugins.frameworks.{path}"), summary=summary)

    registry.engine(
        "transformers",
        lazy("leyden_plugins.engines.transformers:TransformersEngine"),
        summary="Transformers in this process, on CPU or GPU",
    )
    registry.engine(
        "vllm",
        lazy("leyden_plugins.engines.vllm:VLLMEngine"),
        summary="vLLM servers in an environment of their own, with weight updates",
    )
    registry.engine(
        "openai-compatible",
        lazy("leyden_plugins.engines.openai_compatible:OpenAICompatibleEngine"),
        summary="a running vLLM, SGLang or llama.cpp whose weights stay as they are",
    )
    registry.gateway("http", lazy("leyden_plugins.gateway:HttpGateway"), summary="OpenAI-compatible HTTP on loopback")
    registry.learner("torch", lazy("leyden_plugins.learners.torch:TorchLearner"), summary="PyTorch in this process")

    for name, path, summary in RL_ALGORITHMS:
        registry.algorithm(name, lazy(f"leyden_plugins.algorithms.rl:{path}"), summary=summary)
    for name, path, summary in OTHER_ALGORITHMS:
        registry.algorithm(name, lazy(f"leyden_plugins.algorithms.{path}"), summary=summary)

    for name, path, summary in PROMPT_ALGORITHMS:
        registry.algorithm(name, lazy(f"leyden_plugins.algorithms.prompt:{path}"), summary=summary)

    registry.credit("broadcast", lazy("leyden.credit:broadcast"), summary="every call gets the whole return")
    registry.credit("per-turn", lazy("leyden.credit:reward_to_go"), summary="a call gets its own reward and later ones")
    registry.credit("per-role", lazy("leyden.credit:per_role"), summary="a role's calls get that role's rewards")

    registry.store("sqlite", lazy("leyden.sqlite:SQLiteStore"), summary="one SQLite file in the run's folder")
    registry.executor(
        "in-process", lazy("leyden.running.executors:InProcessExecutor"), summary="rollouts on the trainer's loop"
    )
    registry.executor(
        "workers", lazy("leyden.running.workers:WorkerExecutor"), summary="rollouts in processes beside the trainer"
    )
    for name, path, summary in DIALECTS:
        registry.dialect(name, lazy(f"leyden_plugins.gateway.dialects.{path}"), summary=summary)

    registry.sink(
        "terminal", lazy("leyden_plugins.observers.terminal:TerminalSink"), summary="progress in the terminal"
    )
    registry.sink("jsonl", lazy("leyden_plugins.observers.jsonl:JsonlSink"), summary="metrics.jsonl in the run")
    registry.sink("report", lazy("leyden_plugins.observers.report:ReportSink"), summary="an HTML report of the run")
    for name, path, summary in TRACKERS:
        registry.sink(name, lazy(f"leyden_plugins.observers.{path}"), summary=summary)

    registry.command(
        "serve", lazy("leyden_plugins.gateway.command:serve_command"), summary="serve an export or a checkpoint"
    )
    registry.command(
        "report", lazy("leyden_plugins.observers.report:report_command"), summary="write a run's report.html again"
    )
    registry.command(
        "rewards", lazy("leyden_plugins.rewards.command:rewards_command"), summary="attach rewards to stored rollouts"
    )
    registry.command(
        "prompts",
        lazy("leyden_plugins.algorithms.prompt.command:prompts_command"),
        summary="show a prompt search: its candidates, and the winner's changes",
    )
    registry.command(
        "traces",
        lazy("leyden_plugins.traces.otel.command:traces_command"),
        summary="traces of other tools in (OTLP), a run's traces out",
    )
