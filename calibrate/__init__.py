"""The measuring side: it times bf16 against float8 on the device at hand, and writes the tables and the plans.

A folder imports only from those above it. A point goes from its shape to its row of a table like this:

    device/      what is measured on: the kinds of device, each with its timer, watch and defaults; locks; how many
                 workers fit. `cuda/` and `cpu.py` are the two kinds there are
    timing/      one arm alone on the device: settle, then count; statistics of the samples
    arms/        what is timed: a linear, a block, a model's decoder layer; compiled ahead; results checked
    processes/   children that compile, wait for their turn and may die: one mechanism, every wait bounded
    points/      one shape: its protocol, its compiled linears, its timing, its record; the pool of workers
    grid/        which shapes: named grids and files; first a coarse part, then the points that decide
    sweep/       many points: tasks, journal, session, spread, tables, progress
    ranks/       the same over torchrun: environment, store, dealing points out, collecting them
    planning/    sets of roles inside a block: subject, protocol, search, visits, workers, the plan
    breakdown/   where the time of one linear goes, kernel by kernel: profiler, roofline, the one-sentence story
    comparison/  tables of one recipe: what changed, whether one still holds here, one merged of several
    report/      for people: the page, maps, figures, and the text and JSON that commands print
"""
