"""The paper's figures and tables, one study each."""
