"""Pure torch modules. They know no process, no file and no device plan; state is passed in."""
