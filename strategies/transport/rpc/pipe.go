package rpc

import (
	"context"
	"sync"
)

// Stream carries requests that are under way together, and their replies.
type Stream interface {
	// Send sends a request; q.Data are not used after it returns. One at a time.
	Send(q *Request) error
	// Recv receives a reply. One at a time.
	Recv(r *Reply) error
	// Close ends both, at once. It may be called twice.
	Close() error
}

// Pipe is a Conn over a Stream.
type Pipe struct {
	s      Stream
	out    chan struct{} // a place for who sends
	reader sync.WaitGroup

	mu    sync.Mutex
	calls map[uint64]*waiter
	last  uint64
	err   error
}

type waiter struct {
	r    *Reply
	done chan struct{}
}

var _ Conn = (*Pipe)(nil)

// NewPipe takes s over.
func NewPipe(s Stream) *Pipe {
	p := &Pipe{s: s, out: make(chan struct{}, 1), calls: map[uint64]*waiter{}}
	p.reader.Go(p.read)
	return p
}

// read hands replies to those who wait. What nobody waits for any more is dropped.
func (p *Pipe) read() {
	for {
		var r Reply
		err := p.s.Recv(&r)
		p.mu.Lock()
		if err != nil {
			p.err = err
			for _, w := range p.calls {
				close(w.done)
			}
			p.calls = nil
			p.mu.Unlock()
			return
		}
		if w := p.calls[r.ID]; w != nil {
			delete(p.calls, r.ID)
			into := w.r.Into
			*w.r = r
			if w.r.Into = into; len(into) == len(r.Data) {
				copy(into, r.Data) // under the lock: the caller cannot leave meanwhile
				w.r.Data = into
			}
			close(w.done)
		}
		p.mu.Unlock()
	}
}

// Call implements Conn. Where ctx ends while the request is being sent, what was
// begun goes on, so that the stream stays whole.
func (p *Pipe) Call(ctx context.Context, q *Request, r *Reply) error {
	w := &waiter{r: r, done: make(chan struct{})}
	p.mu.Lock()
	if p.calls == nil {
		err := p.err
		p.mu.Unlock()
		return Gone(ctx, err)
	}
	p.last++
	q.ID = p.last
	p.calls[q.ID] = w
	p.mu.Unlock()
	select {
	case p.out <- struct{}{}:
	case <-ctx.Done():
		p.leave(q.ID)
		return ctx.Err()
	}
	err := p.s.Send(q)
	<-p.out
	if err != nil {
		p.leave(q.ID)
		return Gone(ctx, err)
	}
	select {
	case <-w.done:
	case <-ctx.Done():
		p.leave(q.ID)
		return ctx.Err()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.calls == nil && r.ID != q.ID {
		return Gone(ctx, p.err)
	}
	return nil
}

// leave gives a call up.
func (p *Pipe) leave(id uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.calls, id)
}

// Close implements Conn.
func (p *Pipe) Close() error {
	err := p.s.Close()
	p.reader.Wait()
	return err
}
