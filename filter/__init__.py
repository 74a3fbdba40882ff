"""The runtime side: it reads a table, and a plan if there is one, and decides layer by layer which linears to convert.

It is light: importing it needs only PyYAML and msgspec. A folder imports only from those above it, and the modules
that lie beside the folders may import from all of them:

    contract/   tables and plans, how they are read, and what their words mean
    locate/     the places where tables and plans lie, and the one that fits a device and recipe
    model/      the linears of a model, their sizes, and the part of each that a rank holds
    decision/   one shape -> an estimate -> a decision with its reason
    explain/    a whole model under one table, for `fp8gate explain`

    auto_filter         the filter itself
    settings            its arguments, checked
    linear_decisions    one linear -> a decision, by the plan or the table
    plan_decisions      a plan -> decisions for a model's blocks
    findings            what should be known about the answers: warnings and errors
    agreement           whether all ranks decided the same
    rank_exchange       texts that ranks leave for each other, in bounded time
    filter_text         the answers as text
"""
