"Exercises by chapter: statement, stub, solution and properties. Importing a module registers its exercises."
