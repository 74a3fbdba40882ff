"""The runtime side: it reads a table, and a plan if there is one, and decides layer by layer which linears to convert.

It is light: importing it needs only PyYAML and msgspec. A folder imports only from those above it, and the modules
that lie beside the folders may import from all of them:

    contract/   tables and plans, how they are read, and what their words mean
    locate/     the places where tables and plans lie, and the one that fits a device and recipe
    model/      the linears of a model, their sizes, and the part of each that a rank holds
    observe/    a model's forward without data, and models described by their config
    decision/   one shape -> an estimate -> a decision with its reason
    policy/     the settings of a filter; what should be known about its answers, and what happens with each kind of it
    planned/    the plan that decides: given, named, or the one that fits; its decisions for a model's blocks
    ranks/      whether all ranks decided the same, in bounded time
    explain/    a whole model by the filter, for `fp8gate explain`

    auto_filter         makes the filter, and checks its arguments
    layer_filter        the filter itself
    linear_decisions    one linear -> a decision, by the plan or the table
    decided_topics      what ranks compare
    filter_text         the answers as text
    terminal_table      tables of text that fit the terminal
"""
