"""The commands, a module each: `add(commands)` declares it, `run(args)` does it and alone imports anything heavy."""
