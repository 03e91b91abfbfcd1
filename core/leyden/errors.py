"""Name what can go wrong in Leyden: one root, few kinds.

The error policy: **a failed rollout is data; a broken program is an exception.** What an agent raises is
recorded on its rollout and never reaches the caller of `fit`; what Leyden raises means that the program, the
configuration or the machine must change. Every kind is also the standard library's exception of the same
meaning, so `except ValueError` written before Leyden was there still holds. All of them pickle, because they
cross process boundaries.
"""


class LeydenError(Exception):
    """Be the root of every error that Leyden raises on purpose."""


class ConfigurationError(LeydenError, ValueError):
    """Refuse an option, or a combination of options, before any work starts."""


class PluginError(LeydenError, RuntimeError):
    """Report a plugin that cannot be loaded, or one that clashes with another."""


class RoleError(LeydenError, LookupError):
    """Report a role pattern that matches nobody, or a role that two policies claim."""


class StoreError(LeydenError, OSError):
    """Report a record that cannot be written or read."""


class RewardError(LeydenError, ValueError):
    """Refuse a reward: wrong type, not finite, or given twice."""


class RolloutError(LeydenError, RuntimeError):
    """Report a rollout that the infrastructure, not the agent, has broken; it may be tried again."""


class EngineError(LeydenError, RuntimeError):
    """Report an engine that cannot answer, or answered what the learner cannot use."""


class ContextLengthError(LeydenError, ValueError):
    """Refuse a prompt that leaves no room for an answer."""


class LostContextError(LeydenError, RuntimeError):
    """Refuse a model call that belongs to no known rollout while rollouts are running here."""


class ConcurrentUseError(RolloutError):
    """Refuse an agent with a memory of its own that two rollouts use at once."""


class CommandError(LeydenError, RuntimeError):
    """Report an agent's program that could not start or failed: the agent's own failure."""


class DatasetError(LeydenError, ValueError):
    """Refuse a set of tasks or of recorded data."""


class MissingExtraError(LeydenError, ImportError):
    """Report an optional dependency that is not installed; the message says what to install."""

    def __reduce__(self) -> tuple[object, ...]:
        # ImportError keeps `name` and `path` as keywords, which the default reduction of a subclass with two
        # bases restores through its state; stating it here keeps that independent of the interpreter.
        return (type(self), self.args, {"name": self.name, "path": self.path})


class DeadlineExceeded(BaseException):
    """Stop an agent whose rollout has no time left.

    Not an `Exception` and not a `LeydenError`: frameworks swallow both `Exception` and `CancelledError` in
    their retry loops, and an agent that outlives its deadline would go on spending tokens.
    """
