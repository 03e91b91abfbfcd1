"""The reward of the seven apps: that of the text-to-SQL demo."""

from examples.text_to_sql.reward import reward


def score(task: dict[str, str], sql: str, rollout: object) -> float:
    """Return 1.0 for a query that answers the question."""
    return reward(task, sql)
