"""Fine-tune a small open model on imported traces: no agent runs, no server is asked.

python -m examples.traces.train runs/traces OUT
"""

import argparse
from pathlib import Path

import leyden
from examples.text_to_sql.train import MODEL


def main() -> None:
    """Parse the options, train and export."""
    from leyden.deploying.export import export
    from leyden_plugins.algorithms.sft import FineTuning
    from leyden_plugins.engines.transformers import TransformersEngine

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    trainer = leyden.Trainer(
        None,
        policies=[leyden.Policy("sql", roles=["writer"], learning_rate=1e-3, final_learning_rate_fraction=0.1)],
        engine=TransformersEngine(MODEL, seed=options.seed),
        algorithm=FineTuning(source=options.traces, epochs=options.epochs, keep=1.0, seed=options.seed),
        run=options.traces / "run",
        seed=options.seed,
    )
    trainer.fit()
    export(trainer.run_folder, options.out)
    print(f"wrote {options.out}; `leyden serve {options.out}` serves it")


if __name__ == "__main__":
    main()
