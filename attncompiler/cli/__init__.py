"""The command line: `attncompiler explain | inspect | plan | zoo | doctor`."""
