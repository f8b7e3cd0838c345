"""The method: from values of every kinematic level to a policy (docs/method.md). Read the files in this order.

    objectives.py   the value stage's losses, and OBJECTIVES: the f of V and the weight omega that belongs to it
    value.py        the value stage: V(s) and one Q per kinematic level
    weights.py      A_i = Q_i - V, and WEIGHTINGS: from A_i to omega_i
    advantages.py   V, Q_i, A_i and omega_i of every frame that the policy visits, computed once
    table.py        the file that holds them, its one reader and its one writer
    ratio.py        the expert ratio: how much likelier a chunk is among the demonstrations; expert_ratio.py fits it
    extraction.py   EXTRACTORS: from that table to the rows and weights that the policy trains on
    value_run.py    which value run a policy takes, and whether it fits
    flow.py         flow matching and the weighted loss of the policy
    policy.py       the policy stage
    parameters.py   numbers that an entry of the tables above declares

OBJECTIVES, WEIGHTINGS and EXTRACTORS are all there is to choose from: a new entry is a change of its one file.
"""
