"""From texts to vectors, for anybody who asks: HTTP, jobs, batches.

Who yields to whom, and where:

| who | yields to | where |
|---|---|---|
| a bulk part | an interactive one | `calls`: lanes, with as many places in flight each |
| a caller with many parts | callers with few, one part each in turn | `work.Lanes` |
| a part that may be at fault | nobody, but flies alone | `work.Apart` |
| a bulk call's inputs in a replica | those of people: what they leave of the next step | `engine.steps` |
| any call in a replica | a suspect, which has a step for itself | `engine.steps` |
| bulk callers of one owner or process | themselves: so many tokens at a time | `bulk.window` |
| batches of one owner and model | those of others | `batches.runner` |
| bulk processes, and the engine on cores that it shares | whoever answers people | `priority` |
"""
