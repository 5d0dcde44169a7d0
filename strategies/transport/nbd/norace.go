//go:build !race

package nbd

func beforeSend()   {}
func afterReceive() {}
