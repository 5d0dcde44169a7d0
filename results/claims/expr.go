package claims

import (
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"strconv"

	"memsync/results"
)

// run is what one run recorded: any row of it for the columns, and its metrics.
type run struct {
	row     results.Row
	metrics map[string]float64
}

// errAbsent says that a run has no value of that name.
var errAbsent = errors.New("not recorded")

// value looks a name up: a metric, else a column, else params.NAME. Columns that hold a
// number are numbers.
func (r run) value(name string) (any, error) {
	if v, ok := r.metrics[name]; ok {
		return v, nil
	}
	text, err := r.row.Get(name)
	if err != nil {
		if _, ok := results.MetricByName(name); ok {
			return nil, fmt.Errorf("%s: %w", name, errAbsent)
		}
		return nil, err
	}
	if v, ok := results.Quantity(text); ok {
		return v, nil
	}
	return text, nil
}

// expr is an expression in Go's syntax over the values of a run: numbers, strings,
// + - * /, comparisons, && || ! and parentheses.
type expr struct {
	text string
	root ast.Expr
}

func parseExpr(text string) (expr, error) {
	root, err := parser.ParseExpr(text)
	if err != nil {
		return expr{}, fmt.Errorf("expression %q: %w", text, err)
	}
	return expr{text, root}, nil
}

func (e expr) number(r run) (float64, error) {
	v, err := eval(e.root, r)
	if err != nil {
		return 0, err
	}
	n, ok := v.(float64)
	if !ok {
		return 0, fmt.Errorf("expression %q is no number", e.text)
	}
	return n, nil
}

func (e expr) bool(r run) (bool, error) {
	v, err := eval(e.root, r)
	if err != nil {
		return false, err
	}
	b, ok := v.(bool)
	if !ok {
		return false, fmt.Errorf("expression %q is no condition", e.text)
	}
	return b, nil
}

func eval(e ast.Expr, r run) (any, error) {
	switch e := e.(type) {
	case *ast.ParenExpr:
		return eval(e.X, r)
	case *ast.Ident:
		if e.Name == "true" || e.Name == "false" {
			return e.Name == "true", nil
		}
		return r.value(e.Name)
	case *ast.SelectorExpr:
		if x, ok := e.X.(*ast.Ident); ok {
			return r.value(x.Name + "." + e.Sel.Name)
		}
	case *ast.BasicLit:
		switch e.Kind {
		case token.INT, token.FLOAT:
			return strconv.ParseFloat(e.Value, 64)
		case token.STRING:
			return strconv.Unquote(e.Value)
		}
	case *ast.UnaryExpr:
		x, err := eval(e.X, r)
		if err != nil {
			return nil, err
		}
		switch v := x.(type) {
		case bool:
			if e.Op == token.NOT {
				return !v, nil
			}
		case float64:
			if e.Op == token.SUB {
				return -v, nil
			}
		}
	case *ast.BinaryExpr:
		x, err := eval(e.X, r)
		if err != nil {
			return nil, err
		}
		// As in Go, the right side of a decided condition is not looked at: a column
		// that only some runs have may stand behind the test for them.
		if b, ok := x.(bool); ok && (e.Op == token.LAND && !b || e.Op == token.LOR && b) {
			return b, nil
		}
		y, err := eval(e.Y, r)
		if err != nil {
			return nil, err
		}
		if v, ok := apply(e.Op, x, y); ok {
			return v, nil
		}
	}
	return nil, fmt.Errorf("expression: cannot use %T here", e)
}

func apply(op token.Token, x, y any) (any, bool) {
	switch x := x.(type) {
	case bool:
		if y, ok := y.(bool); ok {
			switch op {
			case token.LAND:
				return x && y, true
			case token.LOR:
				return x || y, true
			}
		}
	case string:
		if y, ok := y.(string); ok {
			switch op {
			case token.EQL:
				return x == y, true
			case token.NEQ:
				return x != y, true
			}
		}
		if _, ok := y.(float64); ok { // a column that is a number in some rows and empty or a word in others
			switch op {
			case token.EQL:
				return false, true
			case token.NEQ:
				return true, true
			}
		}
	case float64:
		y, ok := y.(float64)
		if !ok {
			if op == token.EQL || op == token.NEQ {
				return op == token.NEQ, true
			}
			return nil, false
		}
		switch op {
		case token.ADD:
			return x + y, true
		case token.SUB:
			return x - y, true
		case token.MUL:
			return x * y, true
		case token.QUO:
			return x / y, true
		case token.LSS:
			return x < y, true
		case token.LEQ:
			return x <= y, true
		case token.GTR:
			return x > y, true
		case token.GEQ:
			return x >= y, true
		case token.EQL:
			return x == y, true
		case token.NEQ:
			return x != y, true
		}
	}
	return nil, false
}
